"""Tiles of rows (R, E), and what PolyNorm computes of them, for its kernels.

A tile is ROWS rows by BLOCK columns. Arrays of one number a row are (3, R), or (4, R) with the
plain sum last, in the order of the weight: x^3, x^2, x.
"""

import triton
import triton.language as tl

from motif_kernels.impl.triton.mxfp8 import quantised


@triton.jit
def load_tile(pointer, row_stride, rows, columns, mask, DTYPE: tl.constexpr):
    """A tile (ROWS, BLOCK) in the compute dtype, 0 where masked."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store_tile(pointer, row_stride, rows, columns, mask, tile):
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def clamp(tile, BOUND: tl.constexpr):
    """Into [-BOUND, BOUND]; NaN stays NaN, as in torch.clamp."""
    if BOUND is not None:
        tile = tl.where(tile > BOUND, BOUND, tl.where(tile < -BOUND, -BOUND, tile))
    return tile


@triton.jit
def pass_inside(gradient, tile, BOUND: tl.constexpr):
    """The gradient of :func:`clamp`: kept where ``tile`` was within the bounds."""
    if BOUND is not None:
        gradient = tl.where(tl.abs(tile) <= BOUND, gradient, 0.0)
    return gradient


@triton.jit
def load_numbers(pointer, rows, mask, row_count):
    """The entries of an array (3, R), as columns (ROWS, 1)."""
    stride = row_count.to(tl.int64)
    return (
        tl.load(pointer + rows, mask=mask, other=0.0)[:, None],
        tl.load(pointer + stride + rows, mask=mask, other=0.0)[:, None],
        tl.load(pointer + 2 * stride + rows, mask=mask, other=0.0)[:, None],
    )


@triton.jit
def store_numbers(pointer, rows, mask, row_count, a3, a2, a1):
    """Columns (ROWS, 1) into an array (3, R), or the first of (4, R)."""
    stride = row_count.to(tl.int64)
    tl.store(pointer + rows[:, None], a3, mask=mask[:, None])
    tl.store(pointer + stride + rows[:, None], a2, mask=mask[:, None])
    tl.store(pointer + 2 * stride + rows[:, None], a1, mask=mask[:, None])


@triton.jit
def _add_3(a3, a2, a1, b3, b2, b1):
    return a3 + b3, a2 + b2, a1 + b1


@triton.jit
def _add_4(a3, a2, a1, a0, b3, b2, b1, b0):
    return a3 + b3, a2 + b2, a1 + b1, a0 + b0


@triton.jit
def _groups(rows, offsets_pointer, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """How many groups end at or before each row, which is the number of its own: by bisection."""
    group = tl.zeros_like(rows)
    for bit in tl.static_range(BITS - 1, -1, -1):
        further = group + (1 << bit)
        there = further <= GROUPS
        end = tl.load(offsets_pointer + further - 1, mask=there, other=0)
        group = tl.where(there & (end <= rows), further, group)
    return group


@triton.jit
def coefficients(
    weight_pointer,
    bias_pointer,
    offsets_pointer,
    rows,
    used,
    GROUPS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """w3, w2, w1 and b: of all rows, or with groups (ROWS, 1)."""
    if GROUPS == 0:
        w3, w2, w1 = tl.load(weight_pointer), tl.load(weight_pointer + 1), tl.load(weight_pointer + 2)
        b = tl.load(bias_pointer)
    else:
        group, used = _groups(rows, offsets_pointer, GROUPS, GROUP_BITS)[:, None], used[:, None]
        w3 = tl.load(weight_pointer + 3 * group, mask=used, other=0.0)
        w2 = tl.load(weight_pointer + 3 * group + 1, mask=used, other=0.0)
        w1 = tl.load(weight_pointer + 3 * group + 2, mask=used, other=0.0)
        b = tl.load(bias_pointer + group, mask=used, other=0.0)
    return w3.to(DTYPE), w2.to(DTYPE), w1.to(DTYPE), b.to(DTYPE)


@triton.jit
def sums_of_powers(x):
    """Sums over columns of x^6, x^4 and x^2 for x (ROWS, BLOCK): three columns (ROWS, 1)."""
    x2 = x * x
    x4 = x2 * x2
    return tl.reduce((x4 * x2, x4, x2), 1, _add_3, keep_dims=True)


@triton.jit
def sums_of_products(g, x):
    """Sums over columns of g x^3, g x^2, g x and g."""
    gx = g * x
    gx2 = gx * x
    return tl.reduce((gx2 * x, gx2, gx, g), 1, _add_4, keep_dims=True)


@triton.jit
def inverse_rms(total, columns, EPS: tl.constexpr):
    return tl.rsqrt(total / columns + EPS)


@triton.jit
def polynomial(x, c3, c2, c1, c0):
    return ((c3 * x + c2) * x + c1) * x + c0


@triton.jit
def gradient_of(g, x, c3, c2, c1, q3, q2, q1):
    """The sum of ``k c_k x^(k-1) (g - q_k x^k)``, where q_k is r_k mean(g n_k)."""
    x2 = x * x
    square = 2 * c2 * (g - q2 * x2)
    cube = 3 * c3 * (g - q3 * (x2 * x))
    return c1 * (g - q1 * x) + x * (square + x * cube)


@triton.jit
def store_result(
    out_pointer, scales_pointer, rows, row_mask, start, columns, y, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of results, with their scales if there is room for those."""
    block = start + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (block < columns)[None, :]
    if scales_pointer is None:
        store_tile(out_pointer, columns, rows, block, mask, y)
    else:
        values, scales = quantised(y.to(tl.float32), ROWS, BLOCK)
        store_tile(out_pointer, columns, rows, block, mask, values)
        block = start // 32 + tl.arange(0, BLOCK // 32)
        mask = row_mask[:, None] & (block < columns // 32)[None, :]
        store_tile(scales_pointer, columns // 32, rows, block, mask, scales)
