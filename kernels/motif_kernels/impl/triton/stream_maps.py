"""Hyper-connections' maps on a GPU: gates, and Sinkhorn's iterations in registers.

An iteration divides x by its sums s: y = x / s. In terms of logarithms the gradient loses y times
its own sum, unless s was clamped, which makes it a constant; and x = y s again. So the backward
kernel repeats the iterations and keeps their divisors alone, n numbers each, in registers.

In a launch table, ``rows`` are the tokens of a program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.constants import LEAST_SUM, MIX_BOUND
from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.impl.triton.stream_tiles import clamp, gate_gradient, gate_of, triton_dtype
from motif_kernels.tuning import launch_choice

_LEAST_SUM, _MIX_BOUND = tl.constexpr(LEAST_SUM), tl.constexpr(MIX_BOUND)


@triton.jit
def _divisor(x, AXIS: tl.constexpr):
    # tl.maximum takes a number for a float32: in float64 the bound would be another one.
    return tl.maximum(tl.sum(x, AXIS, keep_dims=True), tl.full([], _LEAST_SUM, x.dtype))


@triton.jit
def _gate_logits(products_pointer, bias_pointer, rows, gates, mask, stride, N: tl.constexpr, DTYPE: tl.constexpr):
    bias = tl.load(bias_pointer + gates, mask=gates < N, other=0.0).to(DTYPE)
    return tl.load(products_pointer + rows[:, None] * stride + N + gates[None, :], mask=mask, other=0.0) + bias[None, :]


@triton.jit
def _mix_logits(
    products_pointer, bias_pointer, rows, entries, inside, mask, stride, N: tl.constexpr, DTYPE: tl.constexpr
):
    bias = tl.load(bias_pointer + N + entries, mask=inside, other=0.0).to(DTYPE)
    return tl.load(products_pointer + rows[:, None, None] * stride + 2 * N + entries, mask=mask, other=0.0) + bias


@triton.jit(do_not_specialize=["row_count"])
def _forward_kernel(
    products_pointer,
    bias_pointer,
    post_pointer,
    mix_pointer,
    row_count,
    stride,
    ITERATIONS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    gate_mask = (rows < row_count)[:, None] & (i < N)[None, :]
    logits = _gate_logits(products_pointer, bias_pointer, rows, i, gate_mask, stride, N, DTYPE)
    tl.store(post_pointer + rows[:, None] * N + i[None, :], gate_of(logits), mask=gate_mask)
    entries = (i[:, None] * N + i[None, :])[None, :, :]
    inside = ((i < N)[:, None] & (i < N)[None, :])[None, :, :]
    mask = (rows < row_count)[:, None, None] & inside
    logits = _mix_logits(products_pointer, bias_pointer, rows, entries, inside, mask, stride, N, DTYPE)
    x = tl.where(inside, tl.exp(clamp(logits, _MIX_BOUND)), 0.0)
    for _ in range(ITERATIONS):
        x = x / _divisor(x, 2)
        x = x / _divisor(x, 1)
    tl.store(mix_pointer + rows[:, None, None] * (N * N) + entries, x, mask=mask)


@triton.jit
def _undo(grad, y, s, AXIS: tl.constexpr):
    """From y = x / s and the gradient of its logarithm to x and its own."""
    total = tl.sum(grad, AXIS, keep_dims=True)
    return grad - y * tl.where(s > _LEAST_SUM, total, 0.0), y * s


@triton.jit(do_not_specialize=["row_count"])
def _backward_kernel(
    grad_post_pointer,
    grad_mix_pointer,
    products_pointer,
    bias_pointer,
    dproducts_pointer,
    row_count,
    stride,
    ITERATIONS: tl.constexpr,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, WIDTH)
    gate_mask = (rows < row_count)[:, None] & (i < N)[None, :]
    dproducts_pointer += rows[:, None] * (N * (N + 2))
    tl.store(dproducts_pointer + i[None, :], tl.zeros([ROWS, WIDTH], DTYPE), mask=gate_mask)
    logits = _gate_logits(products_pointer, bias_pointer, rows, i, gate_mask, stride, N, DTYPE)
    grad = tl.zeros([ROWS, WIDTH], DTYPE)
    if grad_post_pointer is not None:
        grad = tl.load(grad_post_pointer + rows[:, None] * N + i[None, :], mask=gate_mask, other=0.0)
    tl.store(dproducts_pointer + N + i[None, :], gate_gradient(grad, logits), mask=gate_mask)
    entries = (i[:, None] * N + i[None, :])[None, :, :]
    inside = ((i < N)[:, None] & (i < N)[None, :])[None, :, :]
    mask = (rows < row_count)[:, None, None] & inside
    grad = tl.zeros([ROWS, WIDTH, WIDTH], DTYPE)
    if grad_mix_pointer is not None:
        logits = _mix_logits(products_pointer, bias_pointer, rows, entries, inside, mask, stride, N, DTYPE)
        y = tl.where(inside, tl.exp(clamp(logits, _MIX_BOUND)), 0.0)
        divisors = ()
        for _ in tl.static_range(ITERATIONS):
            of_rows = _divisor(y, 2)
            y = y / of_rows
            of_columns = _divisor(y, 1)
            y = y / of_columns
            divisors = divisors + (of_rows, of_columns)  # type: ignore[assignment]
        grad = y * tl.load(grad_mix_pointer + rows[:, None, None] * (N * N) + entries, mask=mask, other=0.0)
        for t in tl.static_range(ITERATIONS):
            grad, y = _undo(grad, y, divisors[2 * (ITERATIONS - t) - 1], 1)
            grad, y = _undo(grad, y, divisors[2 * (ITERATIONS - t) - 2], 2)
        grad = tl.where(tl.abs(logits) <= _MIX_BOUND, grad, 0.0)
    tl.store(dproducts_pointer[:, :, None] + 2 * N + entries, grad, mask=mask)


def _tile(kernel: str, products: Tensor, n: int, iterations: int) -> tuple[tuple[int], dict[str, Any]]:
    choice = launch_choice(kernel, n, products.device)
    rows = min(choice["rows"], next_power_of_2(len(products)))
    return (cdiv(len(products), rows),), {
        "ITERATIONS": iterations,
        "N": n,
        "WIDTH": next_power_of_2(n),
        "ROWS": rows,
        "DTYPE": triton_dtype(products),
        "num_warps": choice["num_warps"],
    }


def maps_forward(products: Tensor, bias: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Gates (R, n) and doubly stochastic matrices (R, n, n) of products (R, n + n + n n)."""
    rows, n = len(products), products.shape[1] - len(bias)
    post, mix = products.new_empty(rows, n), products.new_empty(rows, n, n)
    if rows:
        grid, tile = _tile("stream_maps_forward", products, n, iterations)
        launch(_forward_kernel, grid, products, bias.contiguous(), post, mix, rows, products.stride(0), **tile)
    return post, mix


def maps_backward(
    grad_post: Tensor | None, grad_mix: Tensor | None, products: Tensor, bias: Tensor, *, iterations: int
) -> tuple[Tensor, Tensor]:
    """Gradients of products and, in their dtype, of bias."""
    rows, n = len(products), products.shape[1] - len(bias)
    dproducts = torch.empty(products.shape, dtype=products.dtype, device=products.device)
    if rows:
        grid, tile = _tile("stream_maps_backward", products, n, iterations)
        grads = (None if g is None else g.contiguous() for g in (grad_post, grad_mix))
        arguments = *grads, products, bias.contiguous(), dproducts
        launch(_backward_kernel, grid, *arguments, rows, products.stride(0), **tile)
    return dproducts, dproducts[:, n:].sum(0)
