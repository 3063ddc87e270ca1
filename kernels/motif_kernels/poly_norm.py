"""PolyNorm, the activation of the Motif models (arXiv 2411.03884), alone and times the feed-forward's other branch."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .cpu import poly_norm as cpu


def _check(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"poly_norm: the input has dtype {x.dtype}; it must be a floating-point tensor")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"poly_norm: the input has shape {tuple(x.shape)}; its last dimension must hold at least one number"
        )
    if tuple(weight.shape) != (3,):
        raise ValueError(f"poly_norm: weight has shape {tuple(weight.shape)}; it must be (3,), for x^3, x^2 and x")
    if tuple(bias.shape) != (1,):
        raise ValueError(f"poly_norm: bias has shape {tuple(bias.shape)}; it must be (1,)")


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``y = w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` with ``n(z) = z / sqrt(mean(z^2) + eps)`` over the last dimension.

    Arithmetic is in float32 (float64 for float64 inputs) with one rounding at the end; finite for |x| up to 1e6.
    Source: PolyCom, arXiv 2411.03884.

    Args:
        x: (..., N), any leading shape.
        weight: (3,), in the order of x^3, x^2, x.
        bias: (1,).
        eps: added to each mean square.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x, weight or bias has another shape.
    """
    _check(x, weight, bias)
    if x.device.type == "cpu":
        return cpu.poly_norm(x, None, weight, bias, eps)
    return reference.poly_norm(x, weight, bias, eps=eps).to(x.dtype)


def mul_poly_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> Tensor:
    """``poly_norm(gate) * up``, the feed-forward block's activation, rounded once after the product.

    Args:
        gate: (..., N), the branch that PolyNorm is applied to.
        up: (..., N), the other branch, of gate's shape and dtype.
        weight: (3,), in the order of gate^3, gate^2, gate.
        bias: (1,).
        eps: added to each mean square.

    Returns:
        Tensor of gate's shape and dtype.

    Raises:
        TypeError: gate is not a floating-point tensor, or up has another dtype.
        ValueError: a tensor has another shape.
    """
    _check(gate, weight, bias)
    if up.shape != gate.shape:
        raise ValueError(
            f"mul_poly_norm: up has shape {tuple(up.shape)} but gate has shape {tuple(gate.shape)}; they must be equal"
        )
    if up.dtype != gate.dtype:
        raise TypeError(f"mul_poly_norm: up is {up.dtype} but gate is {gate.dtype}; they must be equal")
    if gate.device.type == "cpu":
        return cpu.poly_norm(gate, up, weight, bias, eps)
    return reference.mul_poly_norm(gate, up, weight, bias, eps=eps).to(gate.dtype)
