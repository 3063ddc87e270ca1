"""RMSNorm over the last dimension, where PyTorch's own is made of many operators: on the CPU."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.cpu import rms_norm as impl
from motif_kernels.ops.shortcut import differentiable, with_shortcut


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x (..., N) with weight (N,)."""
    out = impl.forward(_rows(x), weight=weight, eps=eps)[0]
    # Not a view of it: FSDP2 warns of modules that return views.
    return torch.ops.aten._unsafe_view(out, x.shape)  # type: ignore[no-any-return]


_operator = torch.library.custom_op("motif::rms_norm", _forward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def _backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the last is empty without one."""
    dx, dw = impl.backward(_rows(grad), _rows(x), weight=weight, eps=eps)
    return dx.view(x.shape), x.new_empty(0) if weight is None else dw.to(weight.dtype, copy=True)


_backward_operator = torch.library.custom_op("motif::rms_norm_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dw = _run_backward(grad, x, weight, ctx.eps)
    return dx, (None if weight is None else dw), None


rms_norm = differentiable(_operator, _forward, _save, _differentiate)
