"""Rows in another order."""

import torch
from torch import Tensor


class _Permute(torch.autograd.Function):
    """``x[order]`` for a permutation, whose gradient is that by the inverse: both are gathers."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        order, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return _Permute.apply(grad, inverse, order), None, None  # type: ignore[no-untyped-call]


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """``x[order]``, for a permutation of its rows and the inverse of that."""
    return _Permute.apply(x, order, inverse)  # type: ignore[no-any-return, no-untyped-call]
