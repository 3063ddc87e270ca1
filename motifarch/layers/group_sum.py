"""Sums over a group of ranks that autograd goes through."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce


def _sum(x: Tensor, group: ProcessGroup) -> Tensor:
    total = all_reduce(x.contiguous(), "sum", group)
    # What ends up as a parameter's gradient must be a plain tensor.
    return total.wait() if isinstance(total, AsyncCollectiveTensor) else total


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _sum(grad, ctx.group), None  # type: ignore[attr-defined]


class _SumBoth(_SumGradient):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group  # type: ignore[attr-defined]
        return _sum(x, group)


def sum_gradient(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensor itself; its gradient is summed over the group."""
    return x if group is None else _SumGradient.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def sum_over(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The group's sum. So is its gradient: each rank goes on to a loss of its own, and x is in all
    of them.
    """
    return x if group is None else _SumBoth.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]
