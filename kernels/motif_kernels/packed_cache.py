"""Attention to a cache by packing its rows: a copy, for backends that know no cache.

How many tokens rows hold is read, which waits for a GPU: a CUDA graph cannot hold this, as it can
the kernel that reads a cache in place. Without a wait, all that a cache has room for would be
copied.
"""

import torch
from torch import Tensor

from motif_kernels import dispatch
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache, Sequences


def _places(batch: int, capacity: int, block_table: Tensor | None, cache: Tensor) -> tuple[Tensor, Tensor]:
    """Where each row's positions lie in the cache: two indices of shape (B, capacity)."""
    position = torch.arange(capacity, device=cache.device)
    if block_table is None:
        return torch.arange(batch, device=cache.device)[:, None].expand(-1, capacity), position.expand(batch, -1)
    size = cache.shape[1]
    return block_table.long()[:, position // size], (position % size).expand(batch, -1)


def attend(inputs: AttentionInputs, cache: Cache, options: AttentionOptions, backend: str) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`."""
    q1, k1, lengths = inputs.q1, inputs.k1, cache.lengths
    batch, seqlen_q = q1.shape[:2]
    capacity = cache.capacity(k1)
    start = torch.zeros_like(lengths) if cache.leftpad is None else cache.leftpad
    position = torch.arange(capacity, device=q1.device)
    held = (position >= start[:, None]) & (position < lengths[:, None])
    row, slot = (index[held] for index in _places(batch, capacity, cache.block_table, k1))
    counts = (lengths.clamp(max=capacity) - start).clamp(min=0)
    documents = Sequences(
        seqlen_q,
        capacity,
        torch.arange(0, (batch + 1) * seqlen_q, seqlen_q, dtype=torch.int32, device=q1.device),
        torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
    )
    packed = inputs.map(lambda t: t.flatten(0, 1), lambda t: t[row, slot])
    return dispatch.attend(packed, options, documents, backend)[0].unflatten(0, (batch, seqlen_q))
