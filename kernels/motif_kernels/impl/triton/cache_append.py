"""Writes new keys or values into a contiguous or paged cache, within their row."""

import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import launch, next_power_of_2


@triton.jit(do_not_specialize=["added", "capacity", "pages", "page_size"])
def _append_kernel(
    cache_pointer,
    tokens_pointer,
    lengths_pointer,
    table_pointer,
    cache_page,
    cache_slot,
    cache_head,
    token_batch,
    token_token,
    token_head,
    table_batch,
    added,
    capacity,
    pages,
    page_size,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One axis, whose 2^31 programs any batch fits: the others of a grid end at 65,535.
    token = (tl.program_id(0) % added).to(tl.int64)
    z = (tl.program_id(0) // added).to(tl.int64)
    position = tl.load(lengths_pointer + z) + token
    room = (position >= 0) & (position < capacity)
    page, slot = z, position
    if table_pointer is not None:
        page = tl.load(table_pointer + z * table_batch + position // page_size, mask=room, other=0).to(tl.int64)
        slot = position % page_size
        room = room & (page >= 0) & (page < pages)
    for start in tl.range(0, HEADS * WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        head, column = at // WIDTH, at % WIDTH
        inside = at < HEADS * WIDTH
        x = tl.load(tokens_pointer + z * token_batch + token * token_token + head * token_head + column, mask=inside)
        place = page * cache_page + slot * cache_slot + head * cache_head + column
        tl.store(cache_pointer + place, x, mask=inside & room)


def append(cache: Tensor, tokens: Tensor, lengths: Tensor, block_table: Tensor | None) -> None:
    """Arguments are :func:`motif_kernels.ops.decoding.append`'s; last dimensions are
    contiguous.
    """
    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    batch, added, heads, width = tokens.shape
    page_size = cache.shape[1]
    launch(
        _append_kernel,
        (added * batch,),
        cache,
        tokens,
        lengths,
        block_table,
        *cache.stride()[:3],
        *tokens.stride()[:3],
        0 if block_table is None else block_table.stride(0),
        added,
        page_size if block_table is None else page_size * block_table.shape[1],
        len(cache),
        page_size,
        HEADS=heads,
        WIDTH=width,
        BLOCK=min(1024, next_power_of_2(heads * width)),
        num_warps=4,
    )
