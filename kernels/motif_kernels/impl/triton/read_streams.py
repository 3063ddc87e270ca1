"""What a sublayer reads of its streams, on a GPU, and the products that all maps are made of.

Forward, a program reads its tokens once for their products and their mean square, and then, with
the gates, out of the GPU's cache for the sum. Backward likewise: first the gates' gradients, then
the streams'. A second kernel multiplies the gradient of the products by the streams: its programs
leave parts of the weight's gradient, which are added up in a fixed order: no atomics.

Streams in bfloat16 meet float32 numbers (the weight, the gradient) as three bfloat16 ones whose sum
is exact: one product in bfloat16 of three times as many columns, as exact as one in float32.

In a launch table, a kernel's size is a stream's bytes; ``rows`` and ``block`` are its tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.impl.triton.stream_tiles import (
    gate_gradient,
    gate_of,
    load_number,
    load_tile,
    store_tile,
    triton_dtype,
)
from motif_kernels.reference import compute_dtype
from motif_kernels.tuning import launch_choice


@triton.jit
def _add_parts(tile, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, PARTS * COLUMNS) to (ROWS, COLUMNS)."""
    if PARTS > 1:
        tile = tl.sum(tl.reshape(tile, (tile.shape[0], PARTS, COLUMNS)), 1)
    return tile


@triton.jit
def _left_parts(x, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """(ROWS, COLUMNS) as a product's left side, beside a right side of parts b_1, b_2 and b_1: in
    parts a_1, a_1 and a_2, so that all is there but a_2 b_2.
    """
    if PARTS > 1:
        first = x.to(DTYPE)
        second = (x - first).to(DTYPE)
        part = tl.arange(0, PARTS)[None, :, None]
        parts = tl.where(part < 2, first[:, None, :], tl.where(part == 2, second[:, None, :], 0.0))
        x = tl.reshape(parts, (x.shape[0], PARTS * x.shape[1]))
    return x.to(DTYPE)


@triton.jit(do_not_specialize=["row_count"])
def _forward_kernel(
    streams_pointer,
    weight_pointer,
    bias_pointer,
    read_pointer,
    products_pointer,
    inverse_rms_pointer,
    row_count,
    columns,
    row_stride,
    stream_stride,
    EPS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The weight is (PARTS * COLUMNS, N * columns), of the dtype that products are taken in."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    of_weight = tl.arange(0, PARTS * COLUMNS)
    sums = tl.zeros([ROWS, PARTS * COLUMNS], DTYPE)
    # Added up last: a product that is fused with the sum over lanes differs from lane to lane.
    squares = tl.zeros([ROWS, BLOCK], DTYPE)
    for i in tl.static_range(N):
        for start in range(0, columns, BLOCK):
            block = start + tl.arange(0, BLOCK)
            inside = block < columns
            offsets = rows[:, None] * row_stride + i * stream_stride + block[None, :]
            x = tl.load(streams_pointer + offsets, mask=row_mask[:, None] & inside[None, :], other=0.0)
            x = x.to(weight_pointer.dtype.element_ty)
            offsets = of_weight[None, :].to(tl.int64) * (N * columns) + i * columns + block[:, None]
            w = tl.load(weight_pointer + offsets, mask=inside[:, None], other=0.0)
            sums = tl.dot(x, w, sums, input_precision="ieee", out_dtype=DTYPE)
            wide = x.to(DTYPE)
            squares += wide * wide
    r = tl.rsqrt(tl.sum(squares, 1) / (N * columns) + EPS)
    products = _add_parts(sums, PARTS, COLUMNS) * r[:, None]
    c = tl.arange(0, COLUMNS)
    tl.store(products_pointer + rows[:, None] * C + c[None, :], products, mask=row_mask[:, None] & (c < C)[None, :])
    tl.store(inverse_rms_pointer + rows, r, mask=row_mask)
    gates = ()
    for i in tl.static_range(N):
        logit = tl.sum(tl.where((c == i)[None, :], products, 0.0), 1) + tl.load(bias_pointer + i).to(DTYPE)
        gates = gates + (gate_of(logit),)  # type: ignore[assignment]
    for start in range(0, columns, BLOCK):
        block = start + tl.arange(0, BLOCK)
        mask = row_mask[:, None] & (block < columns)[None, :]
        read = tl.zeros([ROWS, BLOCK], DTYPE)
        for i in tl.static_range(N):
            pointer = streams_pointer + i * stream_stride
            read += gates[i][:, None] * load_tile(pointer, row_stride, rows, block, mask, DTYPE)
        store_tile(read_pointer, columns, rows, block, mask, read)


@triton.jit(do_not_specialize=["row_count"])
def _backward_kernel(
    grad_pointer,
    grad_products_pointer,
    streams_pointer,
    weight_pointer,
    bias_pointer,
    products_pointer,
    inverse_rms_pointer,
    dstreams_pointer,
    dlogits_pointer,
    dq_pointer,
    row_count,
    columns,
    grad_stride,
    row_stride,
    stream_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Leaves the gradients of the gates' logits (R, N), and of the products before they were
    divided by the root mean square, (R, C). The weight is (PARTS * COLUMNS, N * columns).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    c = tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (c < C)[None, :]
    offsets = rows[:, None] * C + c[None, :]
    r = load_number(inverse_rms_pointer, 1, rows, row_mask, DTYPE)
    p = tl.load(products_pointer + offsets, mask=mask, other=0.0)
    dp = tl.zeros([ROWS, COLUMNS], DTYPE)
    if grad_products_pointer is not None:
        dp += tl.load(grad_products_pointer + offsets, mask=mask, other=0.0)
    gates = ()
    if grad_pointer is not None:
        for i in tl.static_range(N):
            dgate = tl.zeros([ROWS, BLOCK], DTYPE)
            for start in range(0, columns, BLOCK):
                block = start + tl.arange(0, BLOCK)
                tile_mask = row_mask[:, None] & (block < columns)[None, :]
                grad = load_tile(grad_pointer, grad_stride, rows, block, tile_mask, DTYPE)
                x = load_tile(streams_pointer + i * stream_stride, row_stride, rows, block, tile_mask, DTYPE)
                dgate += grad * x
            logit = load_number(products_pointer + i, C, rows, row_mask, DTYPE) + tl.load(bias_pointer + i).to(DTYPE)
            dlogit = gate_gradient(tl.sum(dgate, 1), logit)
            tl.store(dlogits_pointer + rows * N + i, dlogit, mask=row_mask)
            dp += tl.where((c == i)[None, :], dlogit[:, None], 0.0)
            gates = gates + (gate_of(logit),)  # type: ignore[assignment]
    dq = dp * r[:, None]
    tl.store(dq_pointer + offsets, dq, mask=mask)
    shrink = tl.sum(tl.where(mask, dq * p, 0.0), 1) * r / (N * columns)  # not fused: see above
    left = _left_parts(dq, PARTS, weight_pointer.dtype.element_ty)
    of_weight = tl.arange(0, PARTS * COLUMNS)
    for i in tl.static_range(N):
        for start in range(0, columns, BLOCK):
            block = start + tl.arange(0, BLOCK)
            inside = block < columns
            tile_mask = row_mask[:, None] & inside[None, :]
            w = tl.load(
                weight_pointer + of_weight[:, None].to(tl.int64) * (N * columns) + i * columns + block[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            dx = tl.dot(left, w, input_precision="ieee", out_dtype=DTYPE)
            dx -= shrink[:, None] * load_tile(
                streams_pointer + i * stream_stride, row_stride, rows, block, tile_mask, DTYPE
            )
            if grad_pointer is not None:
                dx += gates[i][:, None] * load_tile(grad_pointer, grad_stride, rows, block, tile_mask, DTYPE)
            store_tile(dstreams_pointer + i * columns, N * columns.to(tl.int64), rows, block, tile_mask, dx)


@triton.jit(do_not_specialize=["row_count"])
def _weight_kernel(
    dq_pointer,
    streams_pointer,
    dweight_pointer,
    row_count,
    columns,
    row_stride,
    stream_stride,
    C: tl.constexpr,
    N: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of a chunk of tokens, ``dq^T X`` for some columns of a stream. dq is (R, PARTS * COLUMNS)."""
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    stream = tl.program_id(1)
    inside = block < columns
    of_dq = tl.arange(0, PARTS * COLUMNS)
    sums = tl.zeros([PARTS * COLUMNS, BLOCK], DTYPE)
    for start in range(0, CHUNK, ROWS):
        rows = tl.program_id(2).to(tl.int64) * CHUNK + start + tl.arange(0, ROWS)
        row_mask = rows < row_count
        dq = tl.load(dq_pointer + rows[None, :] * (PARTS * COLUMNS) + of_dq[:, None], mask=row_mask[None, :], other=0.0)
        offsets = rows[:, None] * row_stride + stream * stream_stride.to(tl.int64) + block[None, :]
        x = tl.load(streams_pointer + offsets, mask=row_mask[:, None] & inside[None, :], other=0.0)
        sums = tl.dot(dq, x.to(dq_pointer.dtype.element_ty), sums, input_precision="ieee", out_dtype=DTYPE)
    if PARTS > 1:
        sums = tl.sum(tl.reshape(sums, (PARTS, COLUMNS, BLOCK)), 0)
    c = tl.arange(0, COLUMNS)
    offsets = (tl.program_id(2).to(tl.int64) * C + c[:, None]) * (N * columns) + stream * columns + block[None, :]
    tl.store(dweight_pointer + offsets, sums, mask=(c < C)[:, None] & inside[None, :])


_PARTS = 4  # three, and one of zeros, for tiles have powers of two


def _columns(count: int) -> int:
    """Columns of a tile of products, at least as many as a product needs."""
    return max(16, next_power_of_2(count))


def _in_parts(x: Tensor, dtype: torch.dtype, dim: int, parts: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """Float32 numbers (C, K) or (R, C), padded along C; for bfloat16 as some of three parts that
    add up to x, one after the other.
    """
    padded = list(x.shape)
    padded[dim] = _columns(x.shape[dim])
    if dtype != torch.bfloat16:
        out = x.new_zeros(padded)
        out.narrow(dim, 0, x.shape[dim]).copy_(x)
        return out
    padded[dim] *= _PARTS
    out = x.new_zeros(padded, dtype=dtype)
    rounded = []
    for _ in range(3):
        rounded.append(x.to(dtype))
        x = x - rounded[-1]
    for place, part in enumerate(parts):
        out.narrow(dim, place * padded[dim] // _PARTS, x.shape[dim]).copy_(rounded[part])
    return out


def _constants(kernel: str, streams: Tensor, count: int) -> dict[str, Any]:
    rows, n, columns = streams.shape
    narrow = "" if streams.dtype == torch.bfloat16 else "_wide"
    choice = launch_choice(f"read_streams_{kernel}{narrow}", columns * streams.element_size(), streams.device)
    return {
        "C": count,
        "N": n,
        "COLUMNS": _columns(count),
        # With fewer rows, warps hold the same tiles, which may differ in the last bit.
        "ROWS": min(choice["rows"], max(32, next_power_of_2(rows))),
        # Numbers that are loaded one by one take registers for their addresses.
        "BLOCK": min(choice["block"], max(16, next_power_of_2(columns)), 32 if columns % 8 else 1 << 20),
        "DTYPE": triton_dtype(streams),
        "num_warps": choice["num_warps"],
        "num_stages": choice["num_stages"],
    }


def _parts(streams: Tensor) -> int:
    return _PARTS if streams.dtype == torch.bfloat16 else 1


def read_forward(streams: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the sublayer reads of streams (R, n, E), their products with weight (C, n E), and the
    inverse root mean squares: (R, E), (R, C), (R,).
    """
    rows, _, columns = streams.shape
    dtype = compute_dtype(streams)
    read = streams.new_empty(rows, columns)
    products = streams.new_empty(rows, len(weight), dtype=dtype)
    inverse_rms = streams.new_empty(rows, dtype=dtype)
    if rows:
        constants = _constants("forward", streams, len(weight))
        launch(
            _forward_kernel,
            (cdiv(rows, constants["ROWS"]),),
            streams,
            _in_parts(weight.to(dtype), streams.dtype, 0),
            bias.contiguous(),
            read,
            products,
            inverse_rms,
            rows,
            columns,
            *streams.stride()[:2],
            EPS=eps,
            PARTS=_parts(streams),
            **constants,
        )
    return read, products, inverse_rms


def read_backward(
    grad: Tensor | None,
    grad_products: Tensor | None,
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    products: Tensor,
    inverse_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the streams, weight and bias, the last two in the compute dtype."""
    rows, n, columns = streams.shape
    count, dtype = len(weight), compute_dtype(streams)
    dstreams = streams.new_empty(streams.shape)
    if not rows:
        return dstreams, torch.zeros_like(weight, dtype=dtype), torch.zeros_like(bias, dtype=dtype)
    dlogits = (torch.empty if grad is not None else torch.zeros)(rows, n, dtype=dtype, device=streams.device)
    dq = torch.empty(rows, count, dtype=dtype, device=streams.device)
    constants = _constants("backward", streams, count)
    launch(
        _backward_kernel,
        (cdiv(rows, constants["ROWS"]),),
        grad,
        None if grad_products is None else grad_products.contiguous(),
        streams,
        # Beside the rounding of the streams' gradient to bfloat16, two parts are exact.
        _in_parts(weight.to(dtype), streams.dtype, 0, parts=(0, 1, 0)),
        bias.contiguous(),
        products,
        inverse_rms,
        dstreams,
        dlogits,
        dq,
        rows,
        columns,
        0 if grad is None else grad.stride(0),
        *streams.stride()[:2],
        PARTS=_parts(streams),
        **constants,
    )
    constants = _constants("weight", streams, count)
    chunk = max(constants["ROWS"], next_power_of_2(cdiv(rows, _CHUNKS)))
    chunks = cdiv(rows, chunk)
    parts = torch.empty(chunks, count, n * columns, dtype=dtype, device=streams.device)
    launch(
        _weight_kernel,
        (cdiv(columns, constants["BLOCK"]), n, chunks),
        _in_parts(dq, streams.dtype, 1),
        streams,
        parts,
        rows,
        columns,
        *streams.stride()[:2],
        PARTS=_parts(streams),
        CHUNK=chunk,
        **constants,
    )
    return dstreams, parts.sum(0), dlogits.sum(0)


# Chunks of tokens that the weight's gradient is added up in, whatever the GPU: beside each other
# they fill it, and their parts are small beside the streams.
_CHUNKS = 8
