"""Tokens' rows, sorted by expert: where they lie, how tokens get there, and what comes back.

Slot j of token t, one of its k, has the row ``places[t, j]`` (int64). ``offsets`` (E,) int32 are
where each expert's rows end; rows past the last are of no expert.
"""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.ops.poly_norm import as_rows
from motif_kernels.ops.shortcut import differentiable, with_shortcut

FAMILY = "expert_rows"


def _sort(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Places (T, k) and offsets (E,) of slots sorted by expert, tokens in their order."""
    if not selected.numel():
        return selected.new_empty(selected.shape, dtype=torch.int64), selected.new_zeros(num_experts, dtype=torch.int32)
    with torch.cuda.device_of(selected):
        return implementation(FAMILY, selected.device).sort_by_expert(selected, num_experts)  # type: ignore[no-any-return]


_sort_operator = torch.library.custom_op("motif::sort_by_expert", _sort, mutates_args=())
sort_by_expert = with_shortcut(_sort_operator, _sort)


@_sort_operator.register_fake
def _(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return selected.new_empty(selected.shape, dtype=torch.int64), selected.new_empty(num_experts, dtype=torch.int32)


def _dispatch(x: Tensor, places: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Each token of x (T, N) in its rows, (rows, N)."""
    if not rows or not x.numel():
        return x.new_zeros(rows, x.shape[1])
    with torch.cuda.device_of(x):
        return implementation(FAMILY, x.device).dispatch(as_rows(x), places, offsets, rows)  # type: ignore[no-any-return]


def combined_dtype(rows: Tensor, weights: Tensor | None) -> torch.dtype:
    """Of the sums of rows times weights."""
    return rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)


def _combine(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each token's rows, times weights (T, k) if given: (T, N)."""
    dtype = combined_dtype(rows, weights)
    if not rows.numel() or not len(places):
        return rows.new_zeros(len(places), rows.shape[1], dtype=dtype)
    with torch.cuda.device_of(rows):
        return implementation(FAMILY, rows.device).combine(as_rows(rows), weights, places, offsets, dtype)  # type: ignore[no-any-return]


def _combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, places: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights."""
    if not rows.numel() or not len(places):
        return torch.zeros_like(rows), torch.zeros_like(weights)
    with torch.cuda.device_of(rows):
        return implementation(FAMILY, rows.device).combine_backward(
            as_rows(grad), as_rows(rows), weights, places, offsets
        )  # type: ignore[no-any-return]


_dispatch_operator = torch.library.custom_op("motif::dispatch_rows", _dispatch, mutates_args=())
_combine_operator = torch.library.custom_op("motif::combine_rows", _combine, mutates_args=())
_backward_operator = torch.library.custom_op("motif::combine_rows_backward", _combine_backward, mutates_args=())
_run_dispatch = with_shortcut(_dispatch_operator, _dispatch)
_run_combine = with_shortcut(_combine_operator, _combine)
_run_backward = with_shortcut(_backward_operator, _combine_backward)


@_dispatch_operator.register_fake
def _(x: Tensor, places: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, x.shape[1])


@_combine_operator.register_fake
def _(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1], dtype=combined_dtype(rows, weights))


@_backward_operator.register_fake
def _(grad: Tensor, rows: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _save_dispatch(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _differentiate_dispatch(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _run_combine(grad, None, *ctx.saved_tensors), None, None, None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, *where = inputs
    ctx.rows = rows.shape[0]
    ctx.save_for_backward(*((rows, weights) if weights is not None else (None, None)), *where)


def _differentiate_combine(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, *where = ctx.saved_tensors
    if weights is None:
        return _run_dispatch(grad, *where, ctx.rows), None, None, None
    return *_run_backward(grad, rows, weights, *where), None, None


dispatch = differentiable(_dispatch_operator, _dispatch, _save_dispatch, _differentiate_dispatch)
combine = differentiable(_combine_operator, _combine, _save_combine, _differentiate_combine)
