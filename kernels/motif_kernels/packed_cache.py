"""Attention to a cache by packing what its rows hold: for backends that know no cache, at the price of a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import diff_attn_varlen_func


def _places(batch: int, capacity: int, block_table: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's positions lie in the cache: two indices of shape (B, capacity)."""
    position = torch.arange(capacity, device=cache.device)
    if block_table is None:
        return torch.arange(batch, device=cache.device)[:, None].expand(-1, capacity), position.expand(batch, -1)
    size = cache.shape[1]
    return block_table.long()[:, position // size], (position % size).expand(batch, -1)


def attend(
    q1: Tensor,
    k1_cache: Tensor,
    q2: Tensor,
    k2_cache: Tensor,
    v_cache: Tensor,
    lam: Tensor,
    lengths: Tensor,
    *,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    norm_eps: float,
    out_scale: float,
    backend: str,
) -> Tensor:
    """Arguments and result are :func:`motif_kernels.operators.decoding.attend`'s."""
    batch, seqlen_q = q1.shape[:2]
    capacity = k1_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
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
        softmax_scale=softmax_scale,
        window_size=(left, right),
        softcap=softcap,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        gate=None if gate is None else gate.flatten(0, 1),
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, seqlen_q))
