"""Differential attention of a few queries against a cache, for CPUs: each cached key and value is
read once.

A key/value head's signal and noise queries become the rows of one matrix. Where k1 and k2 lie side
by side in the cache, as the layers keep them, the rows are ``[q1, 0]`` and ``[0, q2]`` over keys as
they are, of width 2D: one call of torch's attention then gives both maps' products with the values,
and copies nothing. Half of the products are with zeros; they cost less than a second pass through
memory. A cache of latents is its own values (``latent.py``): torch's fast path wants values as wide
as keys, and so the rotated columns are multiplied too, and left out of what comes of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels import latent
from motif_kernels.reference import compute_dtype
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache


def _joined(k1: Tensor, k2: Tensor) -> Tensor | None:
    """Both caches' keys as one view: k1 itself, or (..., 2D) where k2 follows it."""
    if k1.shape != k2.shape or k1.stride() != k2.stride():
        return None
    distance, width = k2.data_ptr() - k1.data_ptr(), k1.shape[-1]
    if not distance:
        return k1
    if distance != width * k1.element_size() or k1.stride(-1) != 1:
        return None
    if k1.untyped_storage().data_ptr() != k2.untyped_storage().data_ptr():
        return None
    return k1.as_strided((*k1.shape[:-1], 2 * width), k1.stride())


def _hidden(seqlen_q: int, seqlen_k: int, left: int, right: int, device: torch.device) -> Tensor | None:
    """(Sq, Sk) True where a key is masked, aligned to the last; None if none is."""
    if not 0 <= right < seqlen_q - 1 and (left < 0 or left >= seqlen_k - 1):
        return None
    ahead = torch.arange(seqlen_k, device=device) - torch.arange(seqlen_k - seqlen_q, seqlen_k, device=device)[:, None]
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if left >= 0:
        hidden |= ahead < -left
    if right >= 0:
        hidden |= ahead > right
    return hidden


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, *, scale: float, softcap: float) -> Tensor:
    """Softmax of q (B, Hk, R, W), k (B, Hk, Sk, W), v (B, Hk, Sk, Dv); hidden (R, Sk)."""
    if softcap > 0:  # torch's attention has none
        dtype = compute_dtype(q)
        logits = softcap * torch.tanh((q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale / softcap)
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
        out = (logits.softmax(-1) @ v.to(dtype)).to(q.dtype)
    else:
        width = max(q.shape[-1], v.shape[-1])  # torch's fast path wants one width; the layers' caches have it
        q, k, padded = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        mask = None
        if hidden is not None:
            mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, padded, attn_mask=mask, scale=scale)[..., : v.shape[-1]]
    if hidden is None:
        return out
    return out.masked_fill(hidden.all(-1)[:, None], 0.0)  # a fully masked row


def _view(cache: Tensor, row: slice, begin: int, end: int, block_table: Tensor | None) -> Tensor:
    """Places [begin, end) of rows, (B, end - begin, H, W); a copy of a paged cache."""
    if block_table is None:
        return cache[row, begin:end]
    size = cache.shape[1]
    blocks = block_table[row, begin // size : -(-end // size)].long()
    skipped = begin - begin % size
    return cache[blocks].flatten(1, 2)[:, begin - skipped : end - skipped]


def attend(inputs: AttentionInputs, cache: Cache, options: AttentionOptions) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`.

    All caches have the same number of heads, which divides that of the noise heads, or of the
    softmax heads.
    """
    q1, k1, q2, k2, v_cache = inputs[:5]
    left, right = options.window_size
    batch, seqlen_q, heads, d = q1.shape
    kv_heads, width = v_cache.shape[2:]
    is_latent = latent.is_latent(inputs)
    ends = cache.lengths.tolist()
    signals, noises = heads // kv_heads, inputs.noise_heads // kv_heads
    queries = q1.view(batch, seqlen_q, kv_heads, signals, d).transpose(1, 2)  # (B, Hk, Sq, heads of a key head, D)
    keys: Tensor | None = k1
    if q2 is not None and k2 is not None:
        keys = _joined(k1, k2)
        width_of_rows = d if keys is not None and keys.shape[-1] == d else 2 * d
        both = q1.new_zeros(batch, kv_heads, seqlen_q, signals + noises, width_of_rows)
        both[..., :signals, :d] = queries
        both[..., signals:, -d:] = q2.view(batch, seqlen_q, kv_heads, noises, d).transpose(1, 2)
        queries = both
    queries = queries.flatten(2, 3)
    begins = [0] * batch if cache.leftpad is None else cache.leftpad.tolist()
    if left >= 0:  # what lies before the first query's window is not read
        begins = [max(b, e - seqlen_q - left) for b, e in zip(begins, ends, strict=True)]
    equal = len(set(ends)) == len(set(begins)) == 1
    groups = [slice(0, batch)] if equal else [slice(b, b + 1) for b in range(batch)]

    width_of_values = d if is_latent else width
    out = None if equal else queries.new_zeros(*queries.shape[:3], width_of_values)
    for rows in groups:
        begin, end = begins[rows.start], ends[rows.start]
        if begin >= end:
            continue  # nothing is held
        if keys is None:
            pair = (t for t in (k1, k2) if t is not None)
            k = torch.cat([_view(t, rows, begin, end, cache.block_table) for t in pair], dim=-1)
        else:
            k = _view(keys, rows, begin, end, cache.block_table)
        hidden = _hidden(seqlen_q, end - begin, left, right, queries.device)
        if hidden is not None:
            hidden = hidden.repeat_interleave(signals + noises, dim=0)
        v = k if is_latent else _view(v_cache, rows, begin, end, cache.block_table)
        part = _attend(
            queries[rows],
            k.transpose(1, 2),
            v.transpose(1, 2),
            hidden,
            scale=options.softmax_scale,
            softcap=options.softcap,
        )
        if out is None:
            out = part
        else:
            out[rows] = part
    if out is None:  # no row holds anything
        out = queries.new_zeros(*queries.shape[:3], width_of_values)
    out = out[..., :width].unflatten(2, (seqlen_q, signals + noises)).transpose(1, 2)
    return _epilogue(out[..., :signals, :], out[..., signals:, :], inputs, options)


def _epilogue(signal: Tensor, noise: Tensor, inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
    """The output (B, Sq, Hs, Dv) of attention's, (B, Sq, Hk, heads of a key head, Dv); a few calls
    on a few numbers.
    """
    shape, width = inputs.q1.shape[:-1], signal.shape[-1]
    grid = (*signal.shape[:3], noise.shape[3] or 1, -1, width)  # a noise head and its signal heads
    dtype = compute_dtype(signal)
    out = signal.to(dtype).reshape(grid)
    if (lam := inputs.lam) is not None:
        if lam.ndim:
            lam = lam.expand(shape).view(*grid[:-1], 1)
        out = torch.addcmul(out, noise.to(dtype)[..., None, :], lam.to(dtype), value=-1)
    if inputs.norm_weight is not None:
        out = F.rms_norm(out, (width,), inputs.norm_weight.to(dtype), options.norm_eps)
    if inputs.gate is not None:
        out = out * torch.sigmoid(inputs.gate.to(dtype)).reshape(grid)
    if options.out_scale != 1.0:
        out = out * options.out_scale
    return out.to(signal.dtype).reshape(*shape, width)
