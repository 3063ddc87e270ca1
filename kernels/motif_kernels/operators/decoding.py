"""Decoding against a key/value cache as torch operators: appending new tokens, and attending to what is held."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..checks import may_read


def append(cache: Tensor, tokens: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Write tokens (B, Snew, H, W) behind the first ``lengths`` (B,) places of each row of a cache.

    The cache is (B, capacity, H, W), or with a block_table (B, blocks of a row) the pool (blocks, block size, H, W).
    What a row has no room for is not written: an error beforehand where lengths may be read.

    Raises:
        ValueError: more tokens than a row has room for, or a block outside the pool (where values may be read).
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
            importlib.import_module("..triton.cache_append", __package__).append(cache, tokens, lengths, block_table)
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


def attend(
    q1: Tensor,
    k1_cache: Tensor,
    q2: Tensor,
    k2_cache: Tensor,
    v_cache: Tensor,
    lam: Tensor,
    lengths: Tensor,
    leftpad: Tensor | None,
    block_table: Tensor | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    num_splits: int | None,
    softmax_scale: float,
    left: int,
    right: int,
    softcap: float,
    norm_eps: float,
    out_scale: float,
    implementation: str,
    packed_backend: str,
) -> Tensor:
    """The output (B, Sq, Hs, Dv); ``lengths`` (B,) int32 counts the tokens held, the queries' own among them.

    ``implementation`` is "triton", "cpu" or "packed": the module that runs it, all under the same arguments;
    ``packed_backend`` is what "packed" hands the packed rows to.

    Raises:
        ValueError: lengths past the capacity, or a block outside the pool (where values may be read).
    """
    capacity = k1_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    check_block_table(block_table, len(k1_cache))
    check_room(lengths, 0, capacity)
    if not q1.numel() or not v_cache.numel() or not capacity:
        return q1.new_zeros(*q1.shape[:-1], v_cache.shape[-1])
    module = {"triton": "..triton.decoding", "cpu": "..cpu.decoding", "packed": "..packed_cache"}[implementation]
    extra: dict[str, Any] = {}
    if implementation == "triton":
        extra = {"num_splits": num_splits}
    elif implementation == "packed":
        extra = {"backend": packed_backend}
    with torch.cuda.device_of(q1):
        out = importlib.import_module(module, __package__).attend(
            q1,
            k1_cache,
            q2,
            k2_cache,
            v_cache,
            lam,
            lengths,
            leftpad=leftpad,
            block_table=block_table,
            norm_weight=norm_weight,
            gate=gate,
            softmax_scale=softmax_scale,
            left=left,
            right=right,
            softcap=softcap,
            norm_eps=norm_eps,
            out_scale=out_scale,
            **extra,
        )
    return out.contiguous()  # as the fake rule promises


attend_to_cache = torch.library.custom_op("motif::diff_attention_with_kvcache", attend, mutates_args=())


@attend_to_cache.register_fake
def _(q1: Tensor, k1_cache: Tensor, q2: Tensor, k2_cache: Tensor, v_cache: Tensor, *_: object) -> Tensor:
    return q1.new_empty(*q1.shape[:-1], v_cache.shape[-1])


def check_room(lengths: Tensor, added: int, capacity: int) -> None:
    """Raise ValueError if a row would hold more than it has room for, or less than none, where values may be read."""
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
