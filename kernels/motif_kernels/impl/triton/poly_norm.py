"""PolyNorm on a GPU: a forward and a backward kernel that read each row from memory once.

With ``n_k = x^k r_k`` and ``r_k = (mean(x^2k) + eps)^-1/2``, for an incoming gradient g
(times ``up``, if there is one):

    d/dx [w n_k] = w k x^(k-1) r_k (g - n_k mean(g n_k)),    d/dw = sum(g n_k),    d/db = sum(g)

Beside the inputs the forward kernel leaves r_k, 12 bytes a row, for the backward kernel, which then
needs a single reduction. That one leaves each row's sums of g n_k and of g in a small float32 array
that is added up afterwards in a fixed order: no atomics.

All sums of a row are reduced as one tuple: its warps wait for each other once. The gradient of
``up`` depends on no sum and is stored before; x is loaded again afterwards, from the GPU's cache.
So g alone stays in registers meanwhile, and two programs of rows of 8,192 fit on a processor.

A program serves a tile of rows. A row that fits into the tile stays in registers between its sums
and what is made from them; a longer one is walked through twice, block by block, the second time
from the GPU's cache.

Arrays of one number a row are (3, R), or (4, R) with the plain sum last, in the order of the
weight: x^3, x^2, x.

With ``offsets``, where the rows of each group end, weight and bias are those of a row's group. Rows
past the last offset are of none: they are not read, and 0 is written for them.

In a launch table, a kernel's size is a row's bytes, ``tile_bytes`` are the bytes of x that a
program holds and ``maxnreg`` is a limit of registers that a thread may use.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.constants import POWER_SCALE
from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.impl.triton.poly_norm_tiles import (
    clamp,
    coefficients,
    gradient_of,
    inverse_rms,
    load_numbers,
    load_tile,
    pass_inside,
    polynomial,
    store_numbers,
    store_result,
    store_tile,
    sums_of_powers,
    sums_of_products,
)
from motif_kernels.reference import compute_dtype
from motif_kernels.tuning import launch_choice

_SCALE = tl.constexpr(POWER_SCALE)


@triton.jit(do_not_specialize=["row_count"])
def _forward_kernel(
    x_pointer,
    up_pointer,
    weight_pointer,
    bias_pointer,
    offsets_pointer,
    inverse_rms_pointer,
    out_pointer,
    scales_pointer,
    row_count,
    columns,
    x_stride,
    up_stride,
    EPS: tl.constexpr,
    BOUND: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    MOMENTS_GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The inverse root mean squares are read if MOMENTS_GIVEN; if not, they are left where there is
    room for them. With room for scales the result, rounded as x is, is quantised to MXFP8.
    """
    ROUNDED: tl.constexpr = x_pointer.dtype.element_ty if scales_pointer is not None else DTYPE
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    block = tl.arange(0, BLOCK)
    used = row_mask if GROUPS == 0 else row_mask & (rows < tl.load(offsets_pointer + GROUPS - 1))
    w3, w2, w1, b = coefficients(weight_pointer, bias_pointer, offsets_pointer, rows, used, GROUPS, GROUP_BITS, DTYPE)
    if ONE_BLOCK:
        mask = used[:, None] & (block < columns)[None, :]
        x = clamp(load_tile(x_pointer, x_stride, rows, block, mask, DTYPE), BOUND) * _SCALE
    if MOMENTS_GIVEN:
        r3, r2, r1 = load_numbers(inverse_rms_pointer, rows, row_mask, row_count)
    else:
        if ONE_BLOCK:
            s6, s4, s2 = sums_of_powers(x)
        else:
            s6, s4, s2 = tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE)
            for start in range(0, columns, BLOCK):
                mask = used[:, None] & (start + block < columns)[None, :]
                x = clamp(load_tile(x_pointer, x_stride, rows, start + block, mask, DTYPE), BOUND) * _SCALE
                t6, t4, t2 = sums_of_powers(x)
                s6, s4, s2 = s6 + t6, s4 + t4, s2 + t2
        r3 = inverse_rms(s6, columns, EPS * _SCALE * _SCALE * _SCALE * _SCALE * _SCALE * _SCALE)
        r2 = inverse_rms(s4, columns, EPS * _SCALE * _SCALE * _SCALE * _SCALE)
        r1 = inverse_rms(s2, columns, EPS * _SCALE * _SCALE)
        if inverse_rms_pointer is not None:
            store_numbers(inverse_rms_pointer, rows, row_mask, row_count, r3, r2, r1)
    c3, c2, c1 = w3 * r3, w2 * r2, w1 * r1
    if ONE_BLOCK:
        y = polynomial(x, c3, c2, c1, b)
        if up_pointer is not None:
            y *= clamp(load_tile(up_pointer, up_stride, rows, block, mask, DTYPE), BOUND)
        y = clamp(y, OUT_BOUND).to(ROUNDED)
        store_result(out_pointer, scales_pointer, rows, row_mask, 0, columns, y, ROWS, BLOCK)
    else:
        for start in range(0, columns, BLOCK):
            mask = used[:, None] & (start + block < columns)[None, :]
            x = clamp(load_tile(x_pointer, x_stride, rows, start + block, mask, DTYPE), BOUND) * _SCALE
            y = polynomial(x, c3, c2, c1, b)
            if up_pointer is not None:
                y *= clamp(load_tile(up_pointer, up_stride, rows, start + block, mask, DTYPE), BOUND)
            y = clamp(y, OUT_BOUND).to(ROUNDED)
            store_result(out_pointer, scales_pointer, rows, row_mask, start, columns, y, ROWS, BLOCK)


@triton.jit
def _through_product(g, y, raw_up, BOUND: tl.constexpr, OUT_BOUND: tl.constexpr):
    """The gradients of y and of ``raw_up``, from that of their product."""
    up = clamp(raw_up, BOUND)
    g = pass_inside(g, y * up, OUT_BOUND)
    return g * up, pass_inside(g * y, raw_up, BOUND)


@triton.jit(do_not_specialize=["row_count"])
def _backward_kernel(
    grad_pointer,
    x_pointer,
    up_pointer,
    weight_pointer,
    bias_pointer,
    offsets_pointer,
    inverse_rms_pointer,
    means_pointer,
    dx_pointer,
    dup_pointer,
    sums_pointer,
    row_count,
    columns,
    grad_stride,
    x_stride,
    up_stride,
    gradient_stride,
    BOUND: tl.constexpr,
    OUT_BOUND: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Means of g n_k that are given are read; if they are not, the sums are left.

    With r_k scaled back, no power here exceeds x^3: x needs no scale.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    block = tl.arange(0, BLOCK)
    used = row_mask if GROUPS == 0 else row_mask & (rows < tl.load(offsets_pointer + GROUPS - 1))
    w3, w2, w1, b = coefficients(weight_pointer, bias_pointer, offsets_pointer, rows, used, GROUPS, GROUP_BITS, DTYPE)
    r3, r2, r1 = load_numbers(inverse_rms_pointer, rows, row_mask, row_count)
    r3, r2, r1 = r3 * (_SCALE * _SCALE * _SCALE), r2 * (_SCALE * _SCALE), r1 * _SCALE
    c3, c2, c1 = w3 * r3, w2 * r2, w1 * r1
    if ONE_BLOCK:
        mask = used[:, None] & (block < columns)[None, :]
        store_mask = row_mask[:, None] & (block < columns)[None, :]
        raw = load_tile(x_pointer, x_stride, rows, block, mask, DTYPE)
        x = clamp(raw, BOUND)
        g = load_tile(grad_pointer, grad_stride, rows, block, mask, DTYPE)
        if up_pointer is not None:
            raw_up = load_tile(up_pointer, up_stride, rows, block, mask, DTYPE)
            g, dup = _through_product(g, polynomial(x, c3, c2, c1, b), raw_up, BOUND, OUT_BOUND)
            store_tile(dup_pointer, gradient_stride, rows, block, store_mask, dup)
    if means_pointer is not None:
        m3, m2, m1 = load_numbers(means_pointer, rows, row_mask, row_count)
    else:
        if ONE_BLOCK:
            g3, g2, g1, g0 = sums_of_products(g, x)
        else:
            g3, g2 = tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE)
            g1, g0 = tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE)
            for start in range(0, columns, BLOCK):
                mask = used[:, None] & (start + block < columns)[None, :]
                x = clamp(load_tile(x_pointer, x_stride, rows, start + block, mask, DTYPE), BOUND)
                g = load_tile(grad_pointer, grad_stride, rows, start + block, mask, DTYPE)
                if up_pointer is not None:
                    raw_up = load_tile(up_pointer, up_stride, rows, start + block, mask, DTYPE)
                    g, _ = _through_product(g, polynomial(x, c3, c2, c1, b), raw_up, BOUND, OUT_BOUND)
                t3, t2, t1, t0 = sums_of_products(g, x)
                g3, g2, g1, g0 = g3 + t3, g2 + t2, g1 + t1, g0 + t0
        g3, g2, g1 = g3 * r3, g2 * r2, g1 * r1
        store_numbers(sums_pointer, rows, row_mask, row_count, g3, g2, g1)
        tl.store(sums_pointer + 3 * row_count.to(tl.int64) + rows[:, None], g0, mask=row_mask[:, None])
        m3, m2, m1 = g3 / columns, g2 / columns, g1 / columns
    q3, q2, q1 = r3 * m3, r2 * m2, r1 * m1
    if ONE_BLOCK:
        raw = load_tile(x_pointer, x_stride, rows, block, mask, DTYPE)  # again: see above
        x = clamp(raw, BOUND)
        dx = pass_inside(gradient_of(g, x, c3, c2, c1, q3, q2, q1), raw, BOUND)
        store_tile(dx_pointer, gradient_stride, rows, block, store_mask, dx)
    else:
        for start in range(0, columns, BLOCK):
            mask = used[:, None] & (start + block < columns)[None, :]
            store_mask = row_mask[:, None] & (start + block < columns)[None, :]
            raw = load_tile(x_pointer, x_stride, rows, start + block, mask, DTYPE)
            x = clamp(raw, BOUND)
            g = load_tile(grad_pointer, grad_stride, rows, start + block, mask, DTYPE)
            if up_pointer is not None:
                raw_up = load_tile(up_pointer, up_stride, rows, start + block, mask, DTYPE)
                g, dup = _through_product(g, polynomial(x, c3, c2, c1, b), raw_up, BOUND, OUT_BOUND)
                store_tile(dup_pointer, gradient_stride, rows, start + block, store_mask, dup)
            dx = pass_inside(gradient_of(g, x, c3, c2, c1, q3, q2, q1), raw, BOUND)
            store_tile(dx_pointer, gradient_stride, rows, start + block, store_mask, dx)


@triton.jit
def _incoming(
    grad_pointer, up_pointer, grad_stride, up_stride, rows, columns, mask, BOUND: tl.constexpr, DTYPE: tl.constexpr
):
    """The gradient that reaches PolyNorm: ``grad``, times ``up`` if there is one."""
    g = load_tile(grad_pointer, grad_stride, rows, columns, mask, DTYPE)
    if up_pointer is not None:
        g *= clamp(load_tile(up_pointer, up_stride, rows, columns, mask, DTYPE), BOUND)
    return g


@triton.jit(do_not_specialize=["row_count"])
def _sums_kernel(
    grad_pointer,
    x_pointer,
    up_pointer,
    sums_pointer,
    row_count,
    columns,
    grad_stride,
    x_stride,
    up_stride,
    BOUND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Power sums of x, or with a gradient product sums: what shards exchange."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < row_count
    block = tl.arange(0, BLOCK)
    a3, a2 = tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE)
    a1, a0 = tl.zeros([ROWS, 1], DTYPE), tl.zeros([ROWS, 1], DTYPE)
    for start in range(0, columns, BLOCK):
        mask = row_mask[:, None] & (start + block < columns)[None, :]
        x = clamp(load_tile(x_pointer, x_stride, rows, start + block, mask, DTYPE), BOUND) * _SCALE
        if grad_pointer is not None:
            g = _incoming(grad_pointer, up_pointer, grad_stride, up_stride, rows, start + block, mask, BOUND, DTYPE)
            t3, t2, t1, t0 = sums_of_products(g, x)
            a0 += t0
        else:
            t3, t2, t1 = sums_of_powers(x)
        a3, a2, a1 = a3 + t3, a2 + t2, a1 + t1
    store_numbers(sums_pointer, rows, row_mask, row_count, a3, a2, a1)
    if grad_pointer is not None:
        tl.store(sums_pointer + 3 * row_count.to(tl.int64) + rows[:, None], a0, mask=row_mask[:, None])


def _tile(kernel: str, x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants of a launch over the rows of x (R, N)."""
    rows, columns = x.shape
    choice = launch_choice(kernel, columns * x.element_size(), x.device)
    elements = max(1, choice["tile_bytes"] // x.element_size())
    block = min(next_power_of_2(columns), elements)
    height = min(elements // block, next_power_of_2(rows))
    return (cdiv(rows, height),), {
        "ROWS": height,
        "BLOCK": block,
        "DTYPE": tl.float64 if compute_dtype(x) == torch.float64 else tl.float32,
        "num_warps": choice["num_warps"],
        "maxnreg": choice.get("maxnreg"),
    }


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor | None = None,
    *,
    inverse_rms: Tensor | None,
    keep_inverse_rms: bool,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None = None,
    out_dtype: torch.dtype,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """PolyNorm of x (R, N), times up (R, N) if given, within out_clamp; and the rows' inverse root
    mean squares (3, R): those given, or if they are to be kept, the rows' own.

    With scales (R, N / 32) of uint8 to be filled, the result is in MXFP8, and out_dtype is uint8.

    Rows may be strided; columns must be contiguous.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    offsets, groups = (None, 0) if offsets is None else (offsets.contiguous(), len(offsets))
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    given = inverse_rms is not None
    if keep_inverse_rms and not given:
        inverse_rms = torch.empty(3, len(x), dtype=compute_dtype(x), device=x.device)
    grid, constants = _tile("poly_norm_forward", x)
    launch(
        _forward_kernel,
        grid,
        x,
        up,
        weight,
        bias,
        offsets,
        inverse_rms,
        out,
        scales,
        *x.shape,
        _stride(x),
        _stride(up),
        EPS=eps,
        BOUND=hidden_clamp,
        OUT_BOUND=out_clamp,
        GROUPS=groups,
        GROUP_BITS=groups.bit_length(),
        MOMENTS_GIVEN=given,
        ONE_BLOCK=constants["BLOCK"] >= x.shape[1],
        **constants,
    )
    return out, inverse_rms


def forward_mxfp8(
    x: Tensor, up: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, **numbers: float | None
) -> tuple[Tensor, Tensor]:
    """The result of :func:`forward` in MXFP8 (R, N), and the scales (R, N / 32)."""
    scales = torch.empty(len(x), x.shape[1] // 32, dtype=torch.uint8, device=x.device)
    options: dict[str, Any] = {"inverse_rms": None, "keep_inverse_rms": False, "out_dtype": torch.uint8, **numbers}
    out, _ = forward(x, up, weight, bias, offsets, scales=scales, **options)
    return out.view(torch.float8_e4m3fn), scales.view(torch.float8_e8m0fnu)


def backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor | None = None,
    *,
    inverse_rms: Tensor,
    mean_products: Tensor | None,
    hidden_clamp: float | None,
    out_clamp: float | None = None,
    joined: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x and up, and each row's sums of g n_3, g n_2, g n_1 and g, (4, R).

    inverse_rms (3, R) is the forward pass's. With mean_products (3, R), the means of g n_k, given,
    the sums are None. Joined, both gradients are one tensor (R, 2 N), the second is None.
    """
    weight, bias = weight.contiguous(), bias.contiguous()
    offsets, groups = (None, 0) if offsets is None else (offsets.contiguous(), len(offsets))
    rows, columns = x.shape
    dup: Tensor | None
    if joined:
        both = torch.empty(rows, 2 * columns, dtype=x.dtype, device=x.device)
        dx, dup = both.chunk(2, dim=-1)
    else:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=x.device) if up is not None else None
    sums = torch.empty(4, len(x), dtype=compute_dtype(x), device=x.device) if mean_products is None else None
    grid, constants = _tile("poly_norm_backward", x)
    launch(
        _backward_kernel,
        grid,
        grad,
        x,
        up,
        weight,
        bias,
        offsets,
        inverse_rms,
        mean_products,
        dx,
        dup,
        sums,
        *x.shape,
        _stride(grad),
        _stride(x),
        _stride(up),
        dx.stride(0),
        BOUND=hidden_clamp,
        OUT_BOUND=out_clamp,
        GROUPS=groups,
        GROUP_BITS=groups.bit_length(),
        ONE_BLOCK=constants["BLOCK"] >= x.shape[1],
        **constants,
    )
    return (both, None, sums) if joined else (dx, dup, sums)


def power_sums(x: Tensor, *, hidden_clamp: float | None) -> Tensor:
    """Sums of x's sixth, fourth and second powers (x scaled by POWER_SCALE): (3, R)."""
    sums = torch.empty(3, len(x), dtype=compute_dtype(x), device=x.device)
    grid, constants = _tile("poly_norm_sums", x)
    launch(_sums_kernel, grid, None, x, None, sums, *x.shape, 0, _stride(x), 0, BOUND=hidden_clamp, **constants)
    return sums


def product_sums(grad: Tensor, x: Tensor, up: Tensor | None, *, hidden_clamp: float | None) -> Tensor:
    """Sums of g x^3, g x^2, g x and g (x scaled; g = grad, times up if given): (4, R)."""
    sums = torch.empty(4, len(x), dtype=compute_dtype(x), device=x.device)
    grid, constants = _tile("poly_norm_sums", x)
    launch(
        _sums_kernel,
        grid,
        grad,
        x,
        up,
        sums,
        *x.shape,
        _stride(grad),
        _stride(x),
        _stride(up),
        BOUND=hidden_clamp,
        **constants,
    )
    return sums
