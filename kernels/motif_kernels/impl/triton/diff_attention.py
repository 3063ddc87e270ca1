"""Launching the attention kernels on plain tensors.

In a launch table, a kernel's size is ``tuning.attention_size``; ``block_m`` queries by ``block_n``
keys is a tile. In the keys' backward pass ``block_m_both`` is for walks over both maps, and
``split`` asks for gradients of keys and of values by launches of their own, and ``parts`` for
queries and keys of 129 to 192 in three parts of 64, not padded to 256. float32, which is for
checks, has tables of its own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.triton.attention_backward import _keys_kernel, _queries_kernel
from motif_kernels.impl.triton.attention_backward_prepare import _prepare_kernel
from motif_kernels.impl.triton.attention_forward import _forward_kernel
from motif_kernels.impl.triton.descriptors import describable, describe
from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.tuning import Entry, attention_size, find_choice, launch_choice
from motif_kernels.types import AttentionInputs, AttentionOptions, Gradients, Results, Sequences

LN_2 = 0.6931471805599453


def _power_of_two(width: int) -> int:
    return max(16, next_power_of_2(width))


def _widths(q: Tensor, v: Tensor, *, parts: bool = False) -> dict[str, int]:
    d, dv = q.shape[-1], v.shape[-1]
    part = 64 if parts and 128 < d <= 192 else _power_of_two(d)
    return {"D": d, "DV": dv, "BLOCK_D": part, "BLOCK_DV": _power_of_two(dv)}


def _tiles(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    return _constants(launch_choice(_listed(kernel, q), _size(q, v), q.device), q, v)


def _described_tiles(kernel: str, q: Tensor, v: Tensor, *others: Tensor | None) -> dict[str, int] | None:
    """The tiles of a kernel whose tensors have tensor descriptors, or None: a table without, or
    addresses that they cannot have.
    """
    choice = find_choice(f"{_listed(kernel, q)}_tma", _size(q, v), q.device)
    return _constants(choice, q, v) if choice is not None and describable(q, v, *others) else None


def _listed(kernel: str, q: Tensor) -> str:
    return f"{kernel}_float32" if q.dtype == torch.float32 else kernel


def _size(q: Tensor, v: Tensor) -> int:
    return attention_size(q.shape[-1], v.shape[-1], q.element_size())


def _constants(choice: Entry, q: Tensor, v: Tensor) -> dict[str, int]:
    return {
        "BLOCK_M": choice["block_m"],
        "BLOCK_N": choice["block_n"],
        "num_warps": choice["num_warps"],
        "num_stages": choice["num_stages"],
        **({"maxnreg": choice["maxnreg"]} if "maxnreg" in choice else {}),
        **{name.upper(): choice[name] for name in ("split", "block_m_both") if name in choice},
        **_widths(q, v, parts=choice.get("parts", False)),
    }


def _described(tensors: Sequence[Tensor | None], shapes: str, tiles: dict[str, int]) -> list[Any]:
    """Descriptors; ``shapes`` has for each tensor its tiles' rows and columns: "MxD" is BLOCK_M by
    BLOCK_D.
    """
    boxes = ([tiles[f"BLOCK_{name}"] for name in shape.split("x")] for shape in shapes.split())
    return [None if x is None else describe(x, *box) for x, box in zip(tensors, boxes, strict=True)]


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Between batch entries, tokens and heads."""
    if x is None:
        return 0, 0, 0
    return (0, x.stride(0), x.stride(1)) if x.ndim == 3 else (x.stride(0), x.stride(1), x.stride(2))


def _lam_strides(lam: Tensor | None) -> tuple[int, int, int]:
    """For lam of shape (), (Hs,), (total, Hs) or (B, S, Hs)."""
    return (0, 0, 0) if lam is None else (0, 0, 0, *lam.stride())[-3:]  # type: ignore[return-value]


def _dense(inputs: AttentionInputs, sequences: Sequences) -> tuple[AttentionInputs, Sequences]:
    """Copies of what the kernels read without a stride, where it has one; queries, keys and values
    were checked.
    """
    gate, weight = inputs.gate, inputs.norm_weight
    inputs = inputs._replace(
        gate=gate.contiguous() if gate is not None and gate.stride(-1) != 1 else gate,
        norm_weight=None if weight is None else weight.contiguous(),
    )
    bounds = (None if t is None else t.contiguous() for t in (sequences.cu_seqlens_q, sequences.cu_seqlens_k))
    return inputs, Sequences(sequences.max_seqlen_q, sequences.max_seqlen_k, *bounds)


def _grid(block: int, max_seqlen: int, cu_seqlens: Tensor | None, heads: int, of: Tensor) -> tuple[int, int, int]:
    """Programs for tiles of ``block`` tokens of each head of each batch entry; packed documents
    have theirs one after the other (``document_tile``).
    """
    if cu_seqlens is None:
        return cdiv(max_seqlen, block), heads, len(of)
    return len(of) // block + len(cu_seqlens), heads, 1


def _lengths(inputs: AttentionInputs, sequences: Sequences) -> tuple[int, ...]:
    """Of sequences, of the tensors, and how many packed documents there are."""
    bounds = sequences.cu_seqlens_q
    return (
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        inputs.q1.shape[:-2].numel(),
        inputs.k1.shape[:-2].numel(),
        0 if bounds is None else len(bounds) - 1,
    )


def _groups(inputs: AttentionInputs) -> int:
    """Noise heads; each softmax head is a group of its own."""
    return inputs.noise_heads or inputs.q1.shape[-2]


def _heads(inputs: AttentionInputs) -> dict[str, int]:
    """How the kernels find a group's heads."""
    groups, heads = _groups(inputs), inputs.q1.shape[-2]
    return {
        "HAS_NOISE": inputs.lam is not None,
        "GROUP": heads // groups,
        "SIGNALS_PER_K1": heads // inputs.k1.shape[-2],
        "NOISES_PER_K2": 1 if inputs.k2 is None else groups // inputs.k2.shape[-2],
        "NOISES_PER_V": groups // inputs.v.shape[-2],
    }


def _walks_both_maps(inputs: AttentionInputs) -> bool:
    """Whether the gradients of both maps' queries come from one walk over the keys: each signal
    head has a noise head, and both maps' tiles fit.
    """
    widths = _widths(inputs.q1, inputs.v)
    return inputs.noise_heads == inputs.q1.shape[-2] and 2 * widths["BLOCK_D"] + widths["BLOCK_DV"] <= 256


def _mask(options: AttentionOptions) -> dict[str, Any]:
    return {
        "SCALE": options.softmax_scale,
        "SOFTCAP": options.softcap,
        "HAS_LEFT": options.left >= 0,
        "HAS_RIGHT": options.right >= 0,
    }


def _like(out: Tensor, x: Tensor) -> Tensor | None:
    """A result (T, heads, Dv) with the output's batch; None for one that was not asked for."""
    return x.view(*out.shape[:-2], *x.shape[-2:]) if x.numel() else None


def _present(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def forward(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions, results: Results) -> Results:
    """Fill the results that are not empty."""
    inputs, sequences = _dense(inputs, sequences)
    q1, k1, q2, k2, v, lam, norm_weight, gate = inputs
    groups, heads = _groups(inputs), q1.shape[-2]
    tensors: list[Any] = [
        *inputs[:5],
        results.out,
        *(_like(results.out, t) for t in (results.difference, results.noise)),
    ]
    tiles = _described_tiles("attention_forward", q1, v, *tensors)
    described = tiles is not None
    if tiles is None:
        tiles = _tiles("attention_forward", q1, v)
    else:
        m, n, d, dv = (tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK_DV"))
        piece = m, min(64, dv)  # of what is written: the kernel's WIDTH
        boxes = ((m, d), (n, d), (m, d), (n, d), (n, dv), piece, piece, piece)
        tensors = [None if t is None else describe(t, *box) for t, box in zip(tensors, boxes, strict=True)]
    grid = _grid(tiles["BLOCK_M"], sequences.max_seqlen_q, sequences.cu_seqlens_q, groups, q1)
    scratch = max_signal = max_noise = None
    if lam is not None:
        scratch = q1.new_empty(q1.shape[:-2].numel(), groups, v.shape[-1], dtype=torch.float32)
    if options.return_max_logits:
        max_signal = q1.new_empty(grid[2] * grid[0], heads, dtype=torch.float32)
        max_noise = q1.new_empty(grid[2] * grid[0], inputs.noise_heads, dtype=torch.float32)
    launch(
        _forward_kernel,
        grid,
        *tensors[:5],
        lam,
        norm_weight,
        gate,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        *tensors[5:],
        scratch,
        _present(results.lse_signal),
        _present(results.lse_noise),
        _present(results.inverse_rms),
        max_signal,
        None if max_noise is None else _present(max_noise),
        *_strides(q1),
        *_strides(k1),
        *_strides(q2),
        *_strides(k2),
        *_strides(v),
        *_lam_strides(lam),
        *_strides(gate),
        *_lengths(inputs, sequences),
        options.left,
        options.right,
        groups,
        options.out_scale,
        NORM_EPS=options.norm_eps,
        DESCRIBED=described,
        **_heads(inputs),
        **_mask(options),
        **tiles,
    )
    if max_signal is None or max_noise is None:
        return results
    return results._replace(max_signal=max_signal.amax(0) * LN_2, max_noise=max_noise.amax(0) * LN_2)


def backward(
    grad: Tensor,
    inputs: AttentionInputs,
    sequences: Sequences,
    options: AttentionOptions,
    difference: Tensor,
    noise: Tensor,
    lse_signal: Tensor,
    lse_noise: Tensor,
    inverse_rms: Tensor,
    gradients: Gradients,
) -> Gradients:
    """Fill the gradients."""
    inputs, sequences = _dense(inputs, sequences)
    q1, q2 = inputs.q1, inputs.q2
    d_a = torch.empty(*q1.shape[:-1], difference.shape[-1], dtype=q1.dtype, device=q1.device)
    # In one walk over both maps, nothing reads the gradient of the noise map's output.
    d_o2 = None
    if q2 is not None and not _walks_both_maps(inputs):
        d_o2 = torch.empty(*q2.shape[:-1], noise.shape[-1], dtype=q2.dtype, device=q2.device)
    deltas = torch.empty_like(lse_signal), torch.empty_like(lse_noise)
    gradients = backward_prepare(
        grad, inputs, options, difference, noise, lse_signal, inverse_rms, d_a, d_o2, deltas, gradients
    )
    saved = (d_a, (lse_signal, lse_noise), deltas)
    if not options.deterministic:
        dq1 = torch.zeros(q1.shape, dtype=torch.float32, device=q1.device)
        dq2 = None if q2 is None else torch.zeros(q2.shape, dtype=torch.float32, device=q2.device)
        gradients = backward_keys(inputs, sequences, options, *saved, d_o2, gradients, dq1, dq2)
        return gradients._replace(q1=dq1.to(q1.dtype), q2=gradients.q2 if dq2 is None else dq2.to(q1.dtype))
    gradients = backward_keys(inputs, sequences, options, *saved, d_o2, gradients, None, None)
    backward_queries(inputs, sequences, options, *saved, d_o2, gradients)
    return gradients


def backward_prepare(
    grad: Tensor,
    inputs: AttentionInputs,
    options: AttentionOptions,
    difference: Tensor,
    noise: Tensor,
    lse_signal: Tensor,
    inverse_rms: Tensor,
    d_a: Tensor,
    d_o2: Tensor | None,
    deltas: tuple[Tensor, Tensor],
    gradients: Gradients,
) -> Gradients:
    """The epilogue's backward: fills d_a, d_o2, the deltas and the gradients of lam and gate."""
    heads, dv = difference.shape[-2:]
    tokens = difference.shape[:-2].numel()
    groups, lam, weight, gate = _groups(inputs), inputs.lam, inputs.norm_weight, inputs.gate
    size, device = difference.element_size(), difference.device
    choice = launch_choice("attention_prepare", dv * size, device)
    width = _power_of_two(dv)
    pairs = max(1, choice["tile_bytes"] // (width * size))
    programs = cdiv(tokens * groups, pairs * choice["tiles"])
    partial = torch.empty(programs, dv, dtype=torch.float32, device=device) if weight is not None else None
    flat = grad.flatten(0, -3)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    flat_gate = None if gate is None else gate.flatten(0, -3)
    flat_lam = lam.flatten(0, 1) if lam is not None and lam.ndim == 3 else lam
    launch(
        _prepare_kernel,
        (programs,),
        flat,
        difference,
        _present(noise),
        flat_lam,
        weight,
        flat_gate,
        _present(inverse_rms),
        lse_signal,
        d_a,
        d_o2,
        deltas[0],
        _present(deltas[1]),
        _present(gradients.lam),
        partial,
        _present(gradients.gate),
        tokens,
        groups,
        *flat.stride()[:2],
        *_lam_strides(flat_lam)[-2:],
        *(flat_gate.stride()[:2] if flat_gate is not None else (0, 0)),
        options.out_scale,
        HAS_NOISE=lam is not None,
        GROUP=heads // groups,
        PAIRS=pairs,
        TILES=choice["tiles"],
        DV=dv,
        BLOCK_DV=width,
        num_warps=choice["num_warps"],
        maxnreg=choice.get("maxnreg"),
    )
    return gradients if partial is None else gradients._replace(norm_weight=partial.sum(0))


def backward_keys(
    inputs: AttentionInputs,
    sequences: Sequences,
    options: AttentionOptions,
    d_a: Tensor,
    lse: tuple[Tensor, Tensor],
    deltas: tuple[Tensor, Tensor],
    d_o2: Tensor | None,
    gradients: Gradients,
    dq1: Tensor | None,
    dq2: Tensor | None,
) -> Gradients:
    """Gradients of keys and values; of queries too, into dq1 and dq2, if they are given."""
    q1, k1, q2, k2, v, lam = inputs[:6]
    groups = _groups(inputs)
    shared = k1.shape[-2] == v.shape[-2] and (k2 is None or k2.shape[-2] == v.shape[-2])
    noises = groups // v.shape[-2] if shared else 1
    shares = groups // noises

    def target(gradient: Tensor) -> Tensor:
        """Where a kernel writes: the gradient, or a part for each noise head, to be added up."""
        if gradient.shape[-2] == shares:
            return gradient
        return gradient.new_empty(*gradient.shape[:-2], shares, gradient.shape[-1], dtype=torch.float32)

    dk1, dv = target(gradients.k1), target(gradients.v)
    dk2 = None if k2 is None or k2 is k1 else target(gradients.k2)
    read = (q1, k1, q2, k2, v, d_a, d_o2)
    # With dQ, keys padded to more than 128, or one signal head a group and a width of more than
    # 128, Triton leaves out fences beside descriptors (tests/kernels/ptx).
    wide_alone = max(q1.shape[-1], v.shape[-1]) > 128 and q1.shape[-2] == groups
    by_descriptors = dq1 is None and not wide_alone
    tiles = _described_tiles("attention_backward_keys", q1, v, *read) if by_descriptors else None
    described = tiles is not None and tiles["BLOCK_D"] <= 128
    if tiles is None or not described:
        tiles = _tiles("attention_backward_keys", q1, v)
    both = q2 is not None and d_o2 is None
    split, of_both = tiles.pop("SPLIT", False), tiles.pop("BLOCK_M_BOTH", tiles["BLOCK_M"])
    if both:
        tiles["BLOCK_M"] = of_both
    grid = _grid(tiles["BLOCK_N"], sequences.max_seqlen_k, sequences.cu_seqlens_k, shares, k1)
    for keys, values in ((True, False), (False, True)) if split else ((True, True),):
        launch(
            _keys_kernel,
            grid,
            *(_described(read, "MxD NxD MxD NxD NxDV MxDV MxDV", tiles) if described else read),
            lam,
            *lse,
            *deltas,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            dk1 if keys else None,
            dk2 if keys else None,
            dv if values else None,
            dq1 if keys else None,
            dq2 if keys else None,
            *(stride for x in read for stride in _strides(x)),
            *_lam_strides(lam),
            *_lengths(inputs, sequences),
            options.left,
            options.right,
            groups,
            BOTH_MAPS=both,
            SAME_KEYS=k2 is k1,
            WITH_K=keys,
            WITH_V=values,
            NOISES=noises,
            DESCRIBED=described,
            K_IN_REGISTERS=described and not values,
            **_heads(inputs),
            **_mask(options),
            **tiles,
        )

    def total(part: Tensor, gradient: Tensor) -> Tensor:
        if part is gradient:
            return gradient
        return part.unflatten(-2, (gradient.shape[-2], -1)).sum(-2).to(gradient.dtype)

    if dk2 is not None:
        gradients = gradients._replace(k2=total(dk2, gradients.k2))
    return gradients._replace(k1=total(dk1, gradients.k1), v=total(dv, gradients.v))


def backward_queries(
    inputs: AttentionInputs,
    sequences: Sequences,
    options: AttentionOptions,
    d_a: Tensor,
    lse: tuple[Tensor, Tensor],
    deltas: tuple[Tensor, Tensor],
    d_o2: Tensor | None,
    gradients: Gradients,
) -> None:
    """Gradients of queries: of both maps in one walk over the keys, or, given d_o2, of each by
    itself.
    """
    q1, k1, q2, k2, v, lam = inputs[:6]
    maps = [(q1, k1, d_a, lse[0], deltas[0], gradients.q1)]
    both = q2 is not None and d_o2 is None
    if q2 is not None and k2 is not None and d_o2 is not None:
        maps.append((q2, k2, d_o2, lse[1], deltas[1], gradients.q2))
    tiles = _described_tiles("attention_backward_queries", q1, v, k1, q2, k2, d_a, d_o2)
    described = tiles is not None
    tiles = tiles or _tiles("attention_backward_queries", q1, v)
    if tiles["BLOCK_D"] > 128:  # then queries are not in registers
        tiles["num_stages"] = min(2, tiles["num_stages"])
    for q, k, d_o, own_lse, delta, dq in maps:
        heads = q.shape[-2]
        read = (q, k, q2 if both else None, k2 if both else None, v, d_o)
        launch(
            _queries_kernel,
            _grid(tiles["BLOCK_M"], sequences.max_seqlen_q, sequences.cu_seqlens_q, heads, q1),
            *(_described(read, "MxD NxD MxD NxD NxDV MxDV", tiles) if described else read),
            lam if both else None,
            own_lse,
            lse[1] if both else None,
            delta,
            deltas[1] if both else None,
            sequences.cu_seqlens_q,
            sequences.cu_seqlens_k,
            dq,
            gradients.q2 if both else None,
            *(stride for x in read for stride in _strides(x)),
            *(_lam_strides(lam) if both else (0, 0, 0)),
            *_lengths(inputs, sequences),
            options.left,
            options.right,
            heads,
            BOTH_MAPS=both,
            DESCRIBED=described,
            HEADS_PER_K=heads // k.shape[-2],
            HEADS_PER_K_NOISE=heads // k2.shape[-2] if both and k2 is not None else 1,
            HEADS_PER_V=heads // v.shape[-2],
            **_mask(options),
            **tiles,
        )
