"""Rows that are sorted by expert: products with their experts' matrices.

``offsets`` (E,) int32 are where each expert's rows end; those of the next begin there. Rows past
the last are of no expert: what they hold is not used, and what comes out of them is 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import rows_of_groups


def _torch_serves(*matrices: Tensor) -> bool:
    """Whether torch's grouped_mm multiplies these without the host knowing the offsets."""
    return all(
        t.is_cuda and t.dtype == torch.bfloat16 and max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in matrices
    )


def _product(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Rows (T, K) times each row's expert's matrix: (E, N, K) transposed, else (E, K, N)."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if _torch_serves(x, matrices):
        out = F.grouped_mm(x, matrices, offs=offsets)  # rows past the last offset are not written
        return out.masked_fill_(rows_of_groups(offsets, len(x))[1][:, None], 0)
    out, start = x.new_empty(len(x), matrices.shape[2]), 0
    for matrix, end in zip(matrices.unbind(0), offsets.tolist(), strict=True):
        if end > start:  # many experts have no rows in a small batch
            torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    out[start:] = 0
    return out


def _weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The sum of ``grad[t] x[t]^T`` over each expert's rows: (T, N) and (T, K) to (E, N, K)."""
    if _torch_serves(grad, x):
        out = F.grouped_mm(grad.T, x, offs=offsets)
        # On Blackwell an expert without rows got numbers (pytorch#172439).
        idle = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return out.masked_fill_(idle[:, None, None], 0)
    out, start = x.new_empty(len(offsets), grad.shape[1], x.shape[1]), 0
    for sums, end in zip(out.unbind(0), offsets.tolist(), strict=True):
        torch.mm(grad[start:end].T, x[start:end], out=sums)
        start = end
    return out


_product_operator = torch.library.custom_op("motif::grouped_product", _product, mutates_args=())
_weight_operator = torch.library.custom_op("motif::grouped_weight_gradient", _weight_gradient, mutates_args=())
_run_product = with_shortcut(_product_operator, _product)
_run_weight_gradient = with_shortcut(_weight_operator, _weight_gradient)


@_product_operator.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@_weight_operator.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    dx = dw = None
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        dx = _run_product(grad, weight, offsets, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dw = _run_weight_gradient(*((grad, x) if ctx.transposed else (x, grad)), offsets)
    return dx, dw, None, None


grouped_product = differentiable(_product_operator, _product, _save_product, _differentiate_product)
