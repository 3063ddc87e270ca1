"""Decoding against a key/value cache as torch operators: appending and attending."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from motif_kernels import latent, packed_cache
from motif_kernels.checks import may_read
from motif_kernels.impl.cpu import decoding as cpu
from motif_kernels.ops import diff_attention as fused
from motif_kernels.ops import schema, take
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache


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
        from motif_kernels.impl.triton import cache_append

        with torch.cuda.device_of(cache):
            cache_append.append(cache, tokens, lengths, block_table)
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


def attend(*arguments: Any) -> Tensor:
    """The output (B, Sq, Hs, Dv) of a call.

    Args:
        *arguments: the fields of AttentionInputs, Cache and AttentionOptions, one after the other;
            who reads the cache ("triton", "cpu" or "packed"); and what "packed" hands the packed
            rows to.

    Raises:
        ValueError: lengths past the capacity, or a block outside the pool (where values may be
            read).
    """
    inputs, cache, options, (reader, packed_backend) = take(arguments, *_CALL)
    return serve(inputs, cache, options, reader, packed_backend)


def serve(inputs: AttentionInputs, cache: Cache, options: AttentionOptions, reader: str, packed_backend: str) -> Tensor:
    """:func:`attend`, with its arguments as they are outside an operator."""
    q1, v = inputs.q1, inputs.v
    check_block_table(cache.block_table, len(v))
    check_room(cache.lengths, 0, cache.capacity(v))
    if not q1.numel() or not v.numel() or not cache.capacity(v):
        return q1.new_zeros(*q1.shape[:-1], v.shape[-1])
    if reader == "cpu":
        return cpu.attend(inputs, cache, options).contiguous()  # as the fake rule promises
    kernels = _kernels(inputs) if reader == "triton" else None
    with torch.cuda.device_of(q1):
        if kernels is not None:
            out = kernels.attend(inputs, cache, options)
        else:
            out = packed_cache.attend(inputs, cache, options, packed_backend)
    return out.contiguous()


def _kernels(inputs: AttentionInputs) -> ModuleType | None:
    """The Triton kernels of latents or of keys and values; None for what looked like latents and is
    too wide, or of too many queries, for the latter.
    """
    if latent.is_latent(inputs):
        from motif_kernels.impl.triton import decoding_latent

        return decoding_latent
    if not latent.are_few(inputs) or fused.unsupported_reason(inputs):
        return None
    from motif_kernels.impl.triton import decoding

    return decoding


_CALL = AttentionInputs, Cache, AttentionOptions
attend_to_cache = torch.library.custom_op(
    "motif::diff_attention_with_kvcache",
    attend,
    mutates_args=(),
    schema=f"({schema(*_CALL)}, str reader, str packed_backend) -> Tensor",
)


@attend_to_cache.register_fake
def _(*arguments: Any) -> Tensor:
    inputs = take(arguments, *_CALL)[0]
    return inputs.q1.new_empty(*inputs.q1.shape[:-1], inputs.v.shape[-1])


def check_room(lengths: Tensor, added: int, capacity: int) -> None:
    """Raises ValueError if a row would hold too much or too little, where values may be read."""
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
