"""The streams' update on a GPU: ``X'_i = sum_j H_ij X_j + post_i o``.

Forward, a program has a tile of all streams in registers. Backward, it walks through its tokens'
columns and adds up the n + n n products of each token in registers, so that incoming gradients,
streams and output are read once and the gradients of the maps need neither atomics nor a second
pass.

In a launch table, a kernel's size is a stream's bytes; ``rows`` and ``block`` are its tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.impl.triton.stream_tiles import load_number, load_tile, store_tile, triton_dtype
from motif_kernels.reference import compute_dtype
from motif_kernels.tuning import launch_choice


@triton.jit(do_not_specialize=["row_count"])
def _forward_kernel(
    streams_pointer,
    out_pointer,
    post_pointer,
    mix_pointer,
    updated_pointer,
    row_count,
    columns,
    row_stride,
    stream_stride,
    out_stride,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (block < columns)[None, :]
    out = load_tile(out_pointer, out_stride, rows, block, mask, DTYPE)
    streams = ()
    for j in tl.static_range(N):
        streams = streams + (load_tile(streams_pointer + j * stream_stride, row_stride, rows, block, mask, DTYPE),)  # type: ignore[assignment]
    for i in tl.static_range(N):
        tile = load_number(post_pointer + i, N, rows, row_mask, DTYPE)[:, None] * out
        for j in tl.static_range(N):
            tile += load_number(mix_pointer + i * N + j, N * N, rows, row_mask, DTYPE)[:, None] * streams[j]
        store_tile(updated_pointer + i * columns, N * columns.to(tl.int64), rows, block, mask, tile)


@triton.jit(do_not_specialize=["row_count"])
def _backward_kernel(
    grad_pointer,
    streams_pointer,
    out_pointer,
    post_pointer,
    mix_pointer,
    dstreams_pointer,
    dout_pointer,
    dpost_pointer,
    dmix_pointer,
    row_count,
    columns,
    grad_row_stride,
    grad_stream_stride,
    row_stride,
    stream_stride,
    out_stride,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    sums = ()  # of each incoming gradient with out and with every stream
    for _ in tl.static_range(N * (N + 1)):
        sums = sums + (tl.zeros([ROWS, BLOCK], DTYPE),)  # type: ignore[assignment]
    for start in range(0, columns, BLOCK):
        block = start + tl.arange(0, BLOCK)
        mask = row_mask[:, None] & (block < columns)[None, :]
        grads = ()
        for i in tl.static_range(N):
            pointer = grad_pointer + i * grad_stream_stride
            grads = grads + (load_tile(pointer, grad_row_stride, rows, block, mask, DTYPE),)  # type: ignore[assignment]
        dout = tl.zeros([ROWS, BLOCK], DTYPE)
        for i in tl.static_range(N):
            dout += load_number(post_pointer + i, N, rows, row_mask, DTYPE)[:, None] * grads[i]
        store_tile(dout_pointer, columns, rows, block, mask, dout)
        tile = load_tile(out_pointer, out_stride, rows, block, mask, DTYPE)
        new_sums = ()
        for i in tl.static_range(N):
            new_sums = new_sums + (sums[i] + grads[i] * tile,)  # type: ignore[assignment]
        for j in tl.static_range(N):
            tile = load_tile(streams_pointer + j * stream_stride, row_stride, rows, block, mask, DTYPE)
            dtile = tl.zeros([ROWS, BLOCK], DTYPE)
            for i in tl.static_range(N):
                dtile += load_number(mix_pointer + i * N + j, N * N, rows, row_mask, DTYPE)[:, None] * grads[i]
                new_sums = new_sums + (sums[N + j * N + i] + grads[i] * tile,)  # type: ignore[assignment]
            store_tile(dstreams_pointer + j * columns, N * columns.to(tl.int64), rows, block, mask, dtile)
        sums = new_sums
    for i in tl.static_range(N):
        tl.store(dpost_pointer + rows * N + i, tl.sum(sums[i], 1), mask=row_mask)
        for j in tl.static_range(N):
            tl.store(dmix_pointer + rows * (N * N) + i * N + j, tl.sum(sums[N + j * N + i], 1), mask=row_mask)


def _tile(kernel: str, streams: Tensor) -> dict[str, Any]:
    rows, n, columns = streams.shape
    choice = launch_choice(kernel, columns * streams.element_size(), streams.device)
    return {
        "N": n,
        "ROWS": min(choice["rows"], next_power_of_2(rows)),
        "BLOCK": min(choice["block"], next_power_of_2(columns)),
        "DTYPE": triton_dtype(streams),
        "num_warps": choice["num_warps"],
    }


def update_forward(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """``H X + post o`` for streams (R, n, E) and out (R, E), rounded once."""
    rows, _, columns = streams.shape
    updated = streams.new_empty(streams.shape)
    if rows:
        tile = _tile("update_streams_forward", streams)
        grid = cdiv(rows, tile["ROWS"]), cdiv(columns, tile["BLOCK"])
        maps = post.contiguous(), mix.contiguous()
        strides = *streams.stride()[:2], out.stride(0)
        launch(_forward_kernel, grid, streams, out, *maps, updated, rows, columns, *strides, **tile)
    return updated


def update_backward(
    grad: Tensor, streams: Tensor, out: Tensor, post: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, out, post and mix, the last two in the compute dtype."""
    rows, _, columns = streams.shape
    dstreams, dout = streams.new_empty(streams.shape), out.new_empty(out.shape)
    dpost, dmix = (torch.empty(t.shape, dtype=compute_dtype(streams), device=t.device) for t in (post, mix))
    if rows:
        tile = _tile("update_streams_backward", streams)
        grid = (cdiv(rows, tile["ROWS"]),)
        inputs = grad, streams, out, post.contiguous(), mix.contiguous()
        strides = *grad.stride()[:2], *streams.stride()[:2], out.stride(0)
        launch(_backward_kernel, grid, *inputs, dstreams, dout, dpost, dmix, rows, columns, *strides, **tile)
    return dstreams, dout, dpost, dmix
