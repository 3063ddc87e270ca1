"""Attention to a cache by packing what its rows hold: for backends that know no cache, at the price
of a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motif_kernels.diff_attention import diff_attn_varlen_func
from motif_kernels.ops.decoding import Options, Tensors


def _places(batch: int, capacity: int, block_table: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's positions lie in the cache: two indices of shape (B, capacity)."""
    position = torch.arange(capacity, device=cache.device)
    if block_table is None:
        return torch.arange(batch, device=cache.device)[:, None].expand(-1, capacity), position.expand(batch, -1)
    size = cache.shape[1]
    return block_table.long()[:, position // size], (position % size).expand(batch, -1)


def attend(tensors: Tensors, options: Options) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`."""
    q1, k1_cache, q2, k2_cache, v_cache, lam, lengths, leftpad, block_table, norm_weight, gate = tensors
    batch, seqlen_q = q1.shape[:2]
    capacity = tensors.capacity
    start = torch.zeros_like(lengths) if leftpad is None else leftpad
    position = torch.arange(capacity, device=q1.device)
    held = (position >= start[:, None]) & (position < lengths[:, None])
    row, slot = (index[held] for index in _places(batch, capacity, block_table, k1_cache))
    counts = (lengths.clamp(max=capacity) - start).clamp(min=0)
    out = diff_attn_varlen_func(
        q1.flatten(0, 1),
        k1_cache[row, slot],
        q2.flatten(0, 1),
        k2_cache[row, slot],
        v_cache[row, slot],
        lam.flatten(0, 1) if lam.ndim == 3 else lam,
        torch.arange(0, (batch + 1) * seqlen_q, seqlen_q, dtype=torch.int32, device=q1.device),
        torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
        seqlen_q,
        capacity,
        softmax_scale=options.softmax_scale,
        window_size=(options.left, options.right),
        softcap=options.softcap,
        norm_weight=norm_weight,
        norm_eps=options.norm_eps,
        out_scale=options.out_scale,
        gate=None if gate is None else gate.flatten(0, 1),
        backend=options.packed_backend,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, seqlen_q))
