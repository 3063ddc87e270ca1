"""Decoding against a key/value cache as torch operators: appending new tokens, and attending to
what is held.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motif_kernels.checks import may_read


def append(cache: Tensor, tokens: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Write tokens (B, Snew, H, W) behind the first ``lengths`` (B,) places of each row of a cache.

    The cache is (B, capacity, H, W), or with a block_table (B, blocks of a row) the pool
    (blocks, block size, H, W). What a row has no room for is not written: an error beforehand where
    lengths may be read.

    Raises:
        ValueError: more tokens than a row has room for, or a block outside the pool
            (where values may be read).
    """
    batch, added = tokens.shape[:2]
    size = cache.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1]
    check_block_table(block_table, len(cache))
    check_room(lengths, added, capacity)
    if not tokens.numel():
        return
    if cache.device.type == "cuda":
        with torch.cuda.device_of(cache):
            importlib.import_module("..impl.triton.cache_append", __package__).append(
                cache, tokens, lengths, block_table
            )
        return
    positions = lengths[:, None].long() + torch.arange(added, device=cache.device)
    row = torch.arange(batch, device=cache.device)[:, None]
    if block_table is None:
        cache[row, positions] = tokens
    else:
        cache[block_table.long().gather(1, positions // size), positions % size] = tokens


append_to_cache = torch.library.custom_op("motif::append_to_cache", append, mutates_args=("cache",))


@append_to_cache.register_fake
def _(cache: Tensor, tokens: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    return None


class Tensors(NamedTuple):
    """The tensors of one call, new tokens already cached;
    :func:`motif_kernels.diff_attn_with_kvcache`'s shapes.
    """

    q1: Tensor
    k1_cache: Tensor
    q2: Tensor
    k2_cache: Tensor
    v_cache: Tensor
    lam: Tensor
    lengths: Tensor
    """(B,) int32, the tokens that rows hold, the queries' own among them."""
    leftpad: Tensor | None
    block_table: Tensor | None
    norm_weight: Tensor | None
    gate: Tensor | None

    @property
    def capacity(self) -> int:
        """Places of a row."""
        return self.k1_cache.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


class Options(NamedTuple):
    """The numbers of one call, and who serves it."""

    num_splits: int | None
    softmax_scale: float
    left: int
    """Keys seen to the left of a query's position, -1 for all."""
    right: int
    """Likewise to the right; 0 is causal."""
    softcap: float
    norm_eps: float
    out_scale: float
    implementation: str
    """"triton", "cpu" or "packed": the module that runs the call."""
    packed_backend: str
    """What "packed" hands the packed rows to."""


_MODULES = {"triton": "..impl.triton.decoding", "cpu": "..impl.cpu.decoding", "packed": "..packed_cache"}


def attend(*arguments: Any) -> Tensor:
    """The output (B, Sq, Hs, Dv) of a call, given as its :class:`Tensors` and :class:`Options` one
    after the other.

    Raises:
        ValueError: lengths past the capacity, or a block outside the pool
            (where values may be read).
    """
    tensors, options = Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT:])
    q1, v_cache = tensors.q1, tensors.v_cache
    check_block_table(tensors.block_table, len(v_cache))
    check_room(tensors.lengths, 0, tensors.capacity)
    if not q1.numel() or not v_cache.numel() or not tensors.capacity:
        return q1.new_zeros(*q1.shape[:-1], v_cache.shape[-1])
    module = importlib.import_module(_MODULES[options.implementation], __package__)
    with torch.cuda.device_of(q1):
        out: Tensor = module.attend(tensors, options)
    return out.contiguous()  # as the fake rule promises


_COUNT = len(Tensors._fields)
_SCHEMA = (
    "(Tensor q1, Tensor k1_cache, Tensor q2, Tensor k2_cache, Tensor v_cache, Tensor lam, Tensor lengths, "
    "Tensor? leftpad, Tensor? block_table, Tensor? norm_weight, Tensor? gate, int? num_splits, float softmax_scale, "
    "int left, int right, float softcap, float norm_eps, float out_scale, str implementation, str packed_backend) "
    "-> Tensor"
)
attend_to_cache = torch.library.custom_op("motif::diff_attention_with_kvcache", attend, mutates_args=(), schema=_SCHEMA)


@attend_to_cache.register_fake
def _(q1: Tensor, k1_cache: Tensor, q2: Tensor, k2_cache: Tensor, v_cache: Tensor, *_: object) -> Tensor:
    return q1.new_empty(*q1.shape[:-1], v_cache.shape[-1])


def check_room(lengths: Tensor, added: int, capacity: int) -> None:
    """Raise ValueError if a row would hold more than it has room for, or less than none, where
    values may be read.
    """
    if not may_read(lengths) or not lengths.numel():
        return
    counts = lengths.tolist()
    smallest, largest = min(counts), max(counts)
    if smallest < 0:
        raise ValueError(f"cache_seqlens holds {smallest}; lengths cannot be negative")
    if largest + added > capacity:
        raise ValueError(
            f"cache_seqlens holds {largest}"
            + (f" and {added} tokens are to be appended" if added else "")
            + f", but a row's cache has room for {capacity}"
        )


def check_block_table(block_table: Tensor | None, blocks: int) -> None:
    """Raise ValueError if a block lies outside the pool, where values may be read."""
    if block_table is None or not block_table.numel() or not may_read(block_table):
        return
    smallest, largest = (int(n) for n in block_table.aminmax())
    if smallest < 0 or largest >= blocks:
        wrong = smallest if smallest < 0 else largest
        raise ValueError(f"block_table names block {wrong}; the cache has blocks 0 to {blocks - 1}")
