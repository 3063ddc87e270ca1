"""Selection of experts and their weights on a GPU: a program serves some rows of logits, which it
reads once.

A row of scores lies in registers. Its k highest are taken one after the other: scores become
integers in the same order, NaN highest, and of equals the first wins. So the order of the work
changes nothing.

In a launch table, a kernel's size is the number of experts, and ``tile`` how many logits a program
holds.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.reference import compute_dtype
from motif_kernels.reference_routing import TINY
from motif_kernels.tuning import launch_choice

_TINY = tl.constexpr(TINY)


@triton.jit
def _softmax_terms(logits, DTYPE: tl.constexpr):
    """Largest logit and sum of exponentials of rows, as columns."""
    largest = tl.max(logits, 1)[:, None]
    return largest, tl.sum(tl.exp(logits - largest), 1)[:, None]


@triton.jit
def _sigmoid(logits):
    return 1 / (1 + tl.exp(-logits))


@triton.jit
def _load_logits(pointer, row_stride, column_stride, rows, columns, mask, DTYPE: tl.constexpr):
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=mask, other=-float("inf")).to(DTYPE)


@triton.jit
def _ordered(scores, INT: tl.constexpr):
    """Integers in the order of the scores: NaN above all, -0 the same as 0."""
    bits = (scores + 0.0).to(INT, bitcast=True)
    size: tl.constexpr = INT.primitive_bitwidth
    highest: tl.constexpr = (1 << (size - 1)) - 1
    ordered = tl.where(bits < 0, bits ^ highest, bits)
    return tl.where(scores != scores, highest, ordered)


@triton.jit(do_not_specialize=["row_count"])
def _select_kernel(
    logits_pointer,
    bias_pointer,
    selected_pointer,
    row_count,
    experts,
    row_stride,
    column_stride,
    SOFTMAX: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    INT: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < row_count)[:, None] & (columns < experts)[None, :]
    logits = _load_logits(logits_pointer, row_stride, column_stride, rows, columns, mask, DTYPE)
    if SOFTMAX:
        largest, total = _softmax_terms(logits, DTYPE)
        scores = tl.exp(logits - largest) / total
    else:
        scores = _sigmoid(logits)
    if bias_pointer is not None:
        scores += tl.load(bias_pointer + columns, mask=columns < experts, other=0.0).to(DTYPE)[None, :]
    lowest: tl.constexpr = -(1 << (INT.primitive_bitwidth - 1))
    order = tl.where(mask, _ordered(scores, INT), lowest)
    for slot in tl.static_range(K):
        best = tl.argmax(order, 1, tie_break_left=True)
        tl.store(selected_pointer + rows * K + slot, best.to(tl.int64), mask=rows < row_count)
        order = tl.where(columns[None, :] == best[:, None], lowest, order)


@triton.jit(do_not_specialize=["row_count"])
def _weights_kernel(
    logits_pointer,
    selected_pointer,
    weights_pointer,
    scores_pointer,
    row_count,
    experts,
    row_stride,
    column_stride,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns, slots = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    mask = (rows < row_count)[:, None] & (columns < experts)[None, :]
    of_slot = (rows < row_count)[:, None] & (slots < K)[None, :]
    logits = _load_logits(logits_pointer, row_stride, column_stride, rows, columns, mask, DTYPE)
    selected = tl.load(selected_pointer + rows[:, None] * K + slots[None, :], mask=of_slot, other=0)
    chosen = tl.load(
        logits_pointer + rows[:, None] * row_stride + selected * column_stride, mask=of_slot, other=0.0
    ).to(DTYPE)
    if SOFTMAX:
        largest, total = _softmax_terms(logits, DTYPE)
        scores, weights = tl.exp(logits - largest) / total, tl.exp(chosen - largest) / total
    else:
        scores, weights = _sigmoid(logits), _sigmoid(chosen)
    weights = tl.where((slots < K)[None, :], weights, 0.0)
    if NORMALISE:
        weights = weights / (tl.sum(weights, 1)[:, None] + _TINY)
    tl.store(scores_pointer + rows[:, None] * experts + columns[None, :], scores, mask=mask)
    tl.store(weights_pointer + rows[:, None] * K + slots[None, :], weights * SCALE, mask=of_slot)


@triton.jit(do_not_specialize=["row_count"])
def _weights_backward_kernel(
    grad_weights_pointer,
    grad_scores_pointer,
    scores_pointer,
    selected_pointer,
    grad_pointer,
    row_count,
    experts,
    SCALE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    NORMALISE: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < row_count)[:, None] & (columns < experts)[None, :]
    offsets = rows[:, None] * experts + columns[None, :]
    grad = tl.zeros([ROWS, BLOCK], DTYPE)
    if grad_scores_pointer is not None:
        grad = tl.load(grad_scores_pointer + offsets, mask=mask, other=0.0)
    if grad_weights_pointer is not None:
        slots = tl.arange(0, SLOTS)
        of_slot = (rows < row_count)[:, None] & (slots < K)[None, :]
        factor, mean = SCALE + tl.zeros([ROWS], DTYPE), tl.zeros([ROWS], DTYPE)
        if NORMALISE:
            of_row = rows[:, None] * K + slots[None, :]
            selected = tl.load(selected_pointer + of_row, mask=of_slot, other=0)
            chosen = tl.load(scores_pointer + rows[:, None] * experts + selected, mask=of_slot, other=0.0)
            total = tl.sum(chosen, 1) + _TINY
            incoming = tl.load(grad_weights_pointer + of_row, mask=of_slot, other=0.0)
            mean = tl.sum(incoming * (chosen / total[:, None]), 1)
            factor = SCALE / total
        for slot in tl.static_range(K):
            expert = tl.load(selected_pointer + rows * K + slot, mask=rows < row_count, other=0)
            one = (tl.load(grad_weights_pointer + rows * K + slot, mask=rows < row_count, other=0.0) - mean) * factor
            grad += tl.where(columns[None, :] == expert[:, None], one[:, None], 0.0)
    scores = tl.load(scores_pointer + offsets, mask=mask, other=0.0)
    if SOFTMAX:
        grad -= tl.sum(grad * scores, 1)[:, None]
    else:
        grad *= 1 - scores
    tl.store(grad_pointer + offsets, grad * scores, mask=mask)


def _tile(kernel: str, logits: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """The grid and the constants of a launch over rows of logits (T, E)."""
    tokens, experts = logits.shape
    choice = launch_choice(kernel, experts, logits.device)
    block = max(2, next_power_of_2(experts))
    rows = max(1, choice["tile"] // block)
    dtype = tl.float64 if compute_dtype(logits) == torch.float64 else tl.float32
    return (cdiv(tokens, rows),), {"ROWS": rows, "BLOCK": block, "DTYPE": dtype, "num_warps": choice["num_warps"]}


def select_experts(logits: Tensor, bias: Tensor | None, top_k: int, softmax: bool) -> Tensor:
    """As :func:`motif_kernels.reference_routing.select_experts`."""
    selected = torch.empty(len(logits), top_k, dtype=torch.int64, device=logits.device)
    grid, constants = _tile("select_experts", logits)
    launch(
        _select_kernel,
        grid,
        logits,
        None if bias is None else bias.contiguous(),
        selected,
        *logits.shape,
        *logits.stride(),
        SOFTMAX=softmax,
        K=top_k,
        INT=tl.int64 if constants["DTYPE"] == tl.float64 else tl.int32,
        **constants,
    )
    return selected


def expert_weights(
    logits: Tensor, selected: Tensor, softmax: bool, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`motif_kernels.reference_routing.expert_weights`."""
    dtype = compute_dtype(logits)
    weights = torch.empty(selected.shape, dtype=dtype, device=logits.device)
    scores = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    grid, constants = _tile("expert_weights", logits)
    launch(
        _weights_kernel,
        grid,
        logits,
        selected.contiguous(),
        weights,
        scores,
        *logits.shape,
        *logits.stride(),
        SCALE=scale,
        SOFTMAX=softmax,
        NORMALISE=normalise,
        K=selected.shape[1],
        SLOTS=next_power_of_2(selected.shape[1]),
        **constants,
    )
    return weights, scores


def expert_weights_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    selected: Tensor,
    softmax: bool,
    normalise: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, (T, E)."""
    grad = torch.empty(scores.shape, dtype=scores.dtype, device=scores.device)
    grid, constants = _tile("expert_weights_backward", scores)
    launch(
        _weights_backward_kernel,
        grid,
        None if grad_weights is None else grad_weights.contiguous(),
        None if grad_scores is None else grad_scores.contiguous(),
        scores.contiguous(),
        selected.contiguous(),
        grad,
        *scores.shape,
        SCALE=scale,
        SOFTMAX=softmax,
        NORMALISE=normalise,
        K=selected.shape[1],
        SLOTS=next_power_of_2(selected.shape[1]),
        **constants,
    )
    return grad
