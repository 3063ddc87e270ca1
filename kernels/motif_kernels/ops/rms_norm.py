"""RMSNorm over the last dimension, where PyTorch's own is made of many operators: on the CPU."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.cpu import rms_norm as impl


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def forward(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x (..., N) with weight (N,)."""
    return impl.forward(_rows(x), weight=weight, eps=eps)[0].view(x.shape)


rms_norm = torch.library.custom_op("motif::rms_norm", forward, mutates_args=())


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("motif::rms_norm_backward", mutates_args=())
def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; the last is empty without one."""
    dx, dw = impl.backward(_rows(grad), _rows(x), weight=weight, eps=eps)
    return dx.view(x.shape), x.new_empty(0) if weight is None else dw.to(weight.dtype, copy=True)


@_rms_norm_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dw = _rms_norm_backward(grad, x, weight, ctx.eps)
    return dx, (None if weight is None else dw), None


rms_norm.register_autograd(_differentiate, setup_context=_save)
