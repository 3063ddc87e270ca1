"""Every operation in plain PyTorch: the specification that all other backends are tested against.

Nothing here is fast and attention maps are materialised. What it buys is that each line can be read
next to the mathematics. Arithmetic is in float32, or in float64 for float64 inputs, and is rounded
once at the end.

Shapes: B batch, S tokens, D head_dim of queries and keys, Dv of values, Hs signal heads, Hn noise
heads, g = Hs / Hn signal heads a noise head.
"""

import torch
from torch import Tensor

from motif_kernels.impl.constants import GATE_BOUND, LEAST_SUM, MIX_BOUND
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences


def compute_dtype(*tensors: Tensor | float | None) -> torch.dtype:
    """The dtype that arithmetic runs in: float64 if any tensor is float64, else float32."""
    has_double = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if has_double else torch.float32


def attention_mask(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    offset: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which keys each query sees, in FlashAttention's convention.

    Query i stands at key position ``i + offset``; by default the last query stands at the last key
    (bottom right). ``window_size=(left, right)`` is inclusive and -1 means unbounded; ``causal`` is
    a right bound of 0.

    Returns:
        Bool tensor (seqlen_q, seqlen_k), True where the query sees the key.
    """
    left, right = window_size
    if causal:
        right = 0
    offset = seqlen_k - seqlen_q if offset is None else offset
    query_position = torch.arange(seqlen_q, device=device)[:, None] + offset
    key_position = torch.arange(seqlen_k, device=device)[None, :]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= key_position >= query_position - left
    if right >= 0:
        mask &= key_position <= query_position + right
    return mask


def packed_attention_mask(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """:func:`attention_mask` for packed documents: a query sees keys of its own document only.

    Returns:
        Bool tensor (total_q, total_k); tokens after the last document see and are seen by none.
    """
    query, key = torch.arange(total_q, device=cu_seqlens_q.device), torch.arange(total_k, device=cu_seqlens_k.device)
    query_document = torch.searchsorted(cu_seqlens_q[1:], query.int(), right=True)
    key_document = torch.searchsorted(cu_seqlens_k[1:], key.int(), right=True)
    # Distance from the document's end: 1 for its last token. The last query stands at the last key.
    query_end, key_end = (torch.cat([c[1:], c[-1:]]) for c in (cu_seqlens_q, cu_seqlens_k))
    query_from_end = query_end[query_document] - query
    key_from_end = key_end[key_document] - key
    ahead = query_from_end[:, None] - key_from_end[None, :]  # key position minus query position
    mask = query_document[:, None] == key_document[None, :]
    mask &= (query < cu_seqlens_q[-1])[:, None]  # tokens after the last document are in none
    left, right = window_size
    if causal:
        right = 0
    if left >= 0:
        mask = mask & (ahead >= -left)
    if right >= 0:
        mask = mask & (ahead <= right)
    return mask


def clear_rest(t: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Packed tokens (total, ...) with zeros, which pass no gradient, after the last document."""
    rest = torch.arange(len(t), device=t.device) >= cu_seqlens[-1]
    return t.masked_fill(rest.view(-1, *[1] * (t.ndim - 1)), 0.0)


def attention_map(
    q: Tensor, k: Tensor, *, mask: Tensor, softmax_scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The softmax's probabilities, with grouped key heads; a fully masked row is 0.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), H a multiple of Hk.
        mask: (Sq, Sk) or what broadcasts to (B, H, Sq, Sk): bool, True where a query sees a key; or
            floats that are added to the logits.
        softmax_scale: multiplies the logits.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.

    Returns:
        The map (B, H, Sq, Sk) in the compute dtype, and each head's largest unmasked logit (H,).
    """
    dtype = compute_dtype(q, k)
    heads = q.shape[2]
    q, k = q.to(dtype), k.to(dtype)
    k = k.repeat_interleave(heads // k.shape[2], dim=2)

    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if mask.is_floating_point():
        mask = mask.to(dtype)
        logits, hidden = logits + mask, mask == -torch.inf
    else:
        hidden = ~mask
        logits = logits.masked_fill(hidden, -torch.inf)
    max_logits = (
        logits.detach().flatten(2).amax(-1).amax(0) if logits.numel() else logits.new_full((heads,), -torch.inf)
    )
    # softmax over a row of -inf is NaN, forward and backward: such rows are softmaxed over zeros
    # and then cleared.
    fully_masked = hidden.all(dim=-1, keepdim=True)
    return logits.masked_fill(fully_masked, 0.0).softmax(dim=-1).masked_fill(hidden, 0.0), max_logits


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor,
    softmax_scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with grouped key and value heads; a fully masked row gives 0.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: (B, Sk, Hv, Dv), H a multiple of Hv.
        mask: (Sq, Sk) bool, True where a query sees a key.
        softmax_scale: multiplies the logits.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.

    Returns:
        The output (B, Sq, H, Dv) in the compute dtype, and each head's largest unmasked logit (H,).
    """
    dtype = compute_dtype(q, k, v)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    probabilities, max_logits = attention_map(q, k, mask=mask, softmax_scale=softmax_scale, softcap=softcap)
    return weigh_values(probabilities, v), max_logits


def weigh_values(probabilities: Tensor, v: Tensor) -> Tensor:
    """Each query's mean of the values: a map (B, H, Sq, Sk) and v (B, Sk, Hv, Dv), H a multiple of
    Hv, to (B, Sq, H, Dv) in the map's dtype.
    """
    v = v.to(probabilities.dtype).repeat_interleave(probabilities.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)


def diff_combine(
    o_signal: Tensor,
    o_noise: Tensor | None,
    lam: Tensor | float | None,
    *,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
) -> Tensor:
    """``signal - lambda * noise``, then sub-norm, gate or neither, in the compute dtype (not
    rounded).

    Shapes and arguments are those of :func:`motif_kernels.diff_combine`; without noise it is
    softmax attention's epilogue.
    """
    dtype = compute_dtype(o_signal, o_noise, lam)
    out = o_signal.to(dtype)
    if o_noise is not None and lam is not None:
        if isinstance(lam, Tensor):
            lam = lam.to(dtype)
            lam = lam[..., None] if lam.ndim else lam
        out = out - lam * o_noise.to(dtype).repeat_interleave(out.shape[-2] // o_noise.shape[-2], dim=-2)
    if norm_weight is not None:
        out = out * torch.rsqrt(out.square().mean(dim=-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    if gate is not None:
        out = out * torch.sigmoid(gate.to(dtype))
    return out * out_scale if out_scale != 1.0 else out


def diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | float | None,
    *,
    mask: Tensor,
    softmax_scale: float,
    softcap: float = 0.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The one operation behind every variant; see :func:`motif_kernels.diff_attn_func` for the
    arguments.

    ``mask`` (Sq, Sk) bool stands for the masks; packed documents are a batch of one with a
    block-diagonal mask.

    Returns:
        The output (B, Sq, Hs, Dv) in q1's dtype, the largest signal logits (Hs,) and noise logits
        (Hn,), None without noise.
    """
    o_signal, max_signal = attention(q1, k1, v, mask=mask, softmax_scale=softmax_scale, softcap=softcap)
    o_noise = max_noise = None
    if q2 is not None and k2 is not None:
        o_noise, max_noise = attention(q2, k2, v, mask=mask, softmax_scale=softmax_scale, softcap=softcap)
    out = diff_combine(
        o_signal, o_noise, lam, norm_weight=norm_weight, norm_eps=norm_eps, out_scale=out_scale, gate=gate
    )
    return out.to(q1.dtype), max_signal, max_noise


def attend(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[Tensor, ...]:
    """:func:`diff_attention` of a call; the largest logits are those of heads that there are."""
    window, packed = options.window_size, sequences.is_packed
    tokens = inputs.q1.shape[-3], inputs.k1.shape[-3]
    bounds_q, bounds_k = sequences.cu_seqlens_q, sequences.cu_seqlens_k
    if bounds_q is not None and bounds_k is not None:
        mask = packed_attention_mask(bounds_q, bounds_k, *tokens, window_size=window)
        inputs = inputs.map(lambda t: clear_rest(t, bounds_q)[None], lambda t: clear_rest(t, bounds_k)[None])
    else:
        mask = attention_mask(*tokens, window_size=window, device=inputs.q1.device)
    out, *max_logits = diff_attention(
        *inputs[:6],
        mask=mask,
        softmax_scale=options.softmax_scale,
        softcap=options.softcap,
        norm_weight=inputs.norm_weight,
        norm_eps=options.norm_eps,
        out_scale=options.out_scale,
        gate=inputs.gate,
    )
    return out[0] if packed else out, *(m.float() for m in max_logits if m is not None)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` in the compute dtype (not rounded); arXiv 2411.03884.

    ``n(z) = z / sqrt(mean(z^2) + eps)`` over the last dimension. The sixth powers are divided by
    the row length before they are summed, so that they stay finite in float32 for |x| up to 1e6.

    Args:
        x: (..., N).
        weight: (3,), or (..., 3) for rows of their own; in the order of x^3, x^2, x.
        bias: (1,), or (..., 1).
        eps: added to each mean square.
    """
    dtype = compute_dtype(x, weight, bias)
    x, (w3, w2, w1) = x.to(dtype), weight.to(dtype).split(1, dim=-1)

    def normalise(z: Tensor) -> Tensor:
        mean_square = (z.square() / z.shape[-1]).sum(dim=-1, keepdim=True)
        return z * torch.rsqrt(mean_square + eps)

    return w3 * normalise(x**3) + w2 * normalise(x**2) + w1 * normalise(x) + bias.to(dtype)


def mul_poly_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``poly_norm(gate) * up`` in the compute dtype, not rounded."""
    return poly_norm(gate, weight, bias, eps=eps) * up.to(compute_dtype(gate, up, weight))


def rows_of_groups(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which group each row is of, and which are of none, past the last offset.

    Args:
        offsets: (E,) int32, where each group's rows end; they begin where those before end.
        rows: how many there are.

    Returns:
        Groups (rows,) int64, a valid one for every row; and bool (rows,).
    """
    index = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    group = torch.searchsorted(offsets, index, right=True)
    return group.clamp(max=len(offsets) - 1), group == len(offsets)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x @ weight[e].T`` for the rows of each group e, in x's dtype; 0 for rows of none.

    Arguments are those of :func:`motif_kernels.grouped_linear`. Every matrix meets every row.
    """
    group, none = rows_of_groups(offsets, len(x))
    x = x.masked_fill(none[:, None], 0)
    out = x.new_zeros(len(x), weight.shape[1])
    for e, matrix in enumerate(weight.unbind(0)):
        out = torch.where((group == e)[:, None], x @ matrix.T, out)
    return out


def grouped_mul_poly_norm(
    gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, *, eps: float = 1e-6
) -> Tensor:
    """:func:`mul_poly_norm` of rows that are sorted by group, with weight (E, 3) and bias (E, 1) of
    their groups, in the compute dtype; 0 for rows of none.
    """
    group, none = rows_of_groups(offsets, len(gate))
    gate, up = gate.masked_fill(none[:, None], 0), up.masked_fill(none[:, None], 0)
    return mul_poly_norm(gate, up, weight[group], bias[group], eps=eps).masked_fill(none[:, None], 0)


def stream_gates(logits: Tensor) -> Tensor:
    """The sigmoid of logits within bounds."""
    return logits.clamp(-GATE_BOUND, GATE_BOUND).sigmoid()


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """``exp(logits)`` (..., n, n), of bounded logits, brought near a doubly stochastic matrix.

    Each iteration divides rows by their sums and then columns by theirs (Sinkhorn and Knopp, 1967).
    """
    matrix = logits.clamp(-MIX_BOUND, MIX_BOUND).exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).clamp(min=LEAST_SUM)
        matrix = matrix / matrix.sum(dim=-2, keepdim=True).clamp(min=LEAST_SUM)
    return matrix


def read_streams(streams: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """What a sublayer reads of streams (..., n, E), in their dtype, and the products of the
    normalised streams with weight (C, n E); arXiv 2512.24880.

    The first n products and bias (n,) are the logits of the gates that the streams are added with.
    """
    dtype = compute_dtype(streams)
    flat = streams.flatten(-2).to(dtype)
    normed = flat * torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + eps)
    products = normed @ weight.to(dtype).mT
    return reduce_streams(streams, products, bias), products


def reduce_streams(streams: Tensor, products: Tensor, bias: Tensor) -> Tensor:
    """The sum of :func:`read_streams`, of products that are known."""
    gates = stream_gates(products[..., : streams.shape[-2]] + bias.to(products.dtype))
    return (gates.unsqueeze(-1) * streams.to(gates.dtype)).sum(dim=-2).to(streams.dtype)


def stream_maps(products: Tensor, bias: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Gates (..., n) for a sublayer's output, and doubly stochastic matrices (..., n, n).

    Their logits are the last n + n n products, of :func:`read_streams`, and bias (n + n n,).
    """
    logits = products[..., -len(bias) :] + bias.to(products.dtype)
    n = products.shape[-1] - len(bias)
    mix = sinkhorn(logits[..., n:].unflatten(-1, (n, n)), iterations)
    return stream_gates(logits[..., :n]), mix


def update_streams(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """``X'_i = sum_j mix_ij X_j + post_i out`` for streams X (..., n, E) and out (..., E), rounded
    to the streams' dtype.
    """
    dtype = compute_dtype(streams)
    mixed = (mix.to(dtype).unsqueeze(-1) * streams.to(dtype).unsqueeze(-3)).sum(dim=-2)
    return (mixed + post.to(dtype).unsqueeze(-1) * out.to(dtype).unsqueeze(-2)).to(streams.dtype)


def to_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """X (..., N), N a multiple of 32, in MXFP8: E4M3 values, and one power of two for 32 of them.

    The power is the least with which none of the 32 exceeds 448, the largest E4M3 number (torchao's
    RCEIL; Mishra et al., arXiv 2506.08027). 32 zeros have 2^-127; NaN makes NaN of its 32.

    Returns:
        (..., N) float8_e4m3fn and (..., N / 32) float8_e8m0fnu.
    """
    blocks = x.float().unflatten(-1, (-1, 32))
    infinity = 0x7F800000
    largest = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(dim=-1, keepdim=True)
    scale = ((largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000)).clamp(min=0)  # 448 is 1.75 * 2^8
    scale = scale.where(largest < infinity, 254)
    factor = torch.exp2(127.0 - scale).where(scale > 0, 1.0).where(largest <= infinity, torch.nan)
    scale = scale.where(largest <= infinity, 255)
    values = (blocks * factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    return values.flatten(-2), scale.squeeze(-1).to(torch.uint8).view(torch.float8_e8m0fnu)
