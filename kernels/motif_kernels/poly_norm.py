"""PolyNorm (arXiv 2411.03884), alone and times the feed-forward's other branch."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices
from motif_kernels.ops import poly_norm as operator


def check_clamps(function: str, **bounds: float | None) -> None:
    """Raise ValueError unless all bounds are positive, or None."""
    for name, bound in bounds.items():
        if bound is not None and bound <= 0:
            raise ValueError(f"{function}: {name} is {bound}; it must be positive, or None for no clamp")


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


def poly_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    group: ProcessGroup | None = None,
    sigmoid_weight: bool = False,
    bias_clamp: float | None = None,
    out_scale: float = 1.0,
    hidden_clamp: float | None = None,
) -> Tensor:
    """``y = w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` with ``n(z) = z / sqrt(mean(z^2) + eps)`` over
    the last dimension.

    Arithmetic is in float32 (float64 for float64 inputs) with one rounding at the end; finite for
    |x| up to 1e6. Under autocast on CUDA the result is float32, as that of PyTorch's own norms.
    Source: PolyCom, arXiv 2411.03884; the optional changes below are those of the Motif models with
    experts.

    Args:
        x: (..., N), any leading shape.
        weight: (3,), in the order of x^3, x^2, x.
        bias: (1,).
        eps: added to each mean square.
        group: x's last dimension is sharded over this process group, in parts that may differ in
            width: the moments are those of the whole row (one all-reduce of three numbers a row
            each way), and the gradients of weight and bias are the full ones on every rank. Every
            rank must call.
        sigmoid_weight: use ``sigmoid(weight)``.
        bias_clamp: use ``clamp(bias, -bias_clamp, bias_clamp)``.
        out_scale: multiplies the result.
        hidden_clamp: clamp x to ``[-hidden_clamp, hidden_clamp]`` first.

    Returns:
        Tensor of x's shape and dtype (float32 under autocast on CUDA).

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x, weight or bias has another shape or device, or a clamp is not positive.
    """
    check_devices(x=x, weight=weight, bias=bias)
    _check(x, weight, bias)
    check_clamps("poly_norm", bias_clamp=bias_clamp, hidden_clamp=hidden_clamp)
    weight, bias = squash(weight, bias, sigmoid_weight, bias_clamp, out_scale, reference.compute_dtype(x))
    return _apply(x, None, weight, bias, eps, group, hidden_clamp)


def mul_poly_norm(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    group: ProcessGroup | None = None,
    sigmoid_weight: bool = False,
    bias_clamp: float | None = None,
    out_scale: float = 1.0,
    hidden_clamp: float | None = None,
) -> Tensor:
    """``poly_norm(gate) * up``, the feed-forward block's activation, rounded once after the
    product.

    Args:
        gate: (..., N), the branch that PolyNorm is applied to.
        up: (..., N), the other branch, of gate's shape and dtype.
        weight: (3,), in the order of gate^3, gate^2, gate.
        bias: (1,).
        eps: added to each mean square.
        group: as in :func:`poly_norm`; ``up`` is sharded like ``gate``.
        sigmoid_weight: use ``sigmoid(weight)``.
        bias_clamp: use ``clamp(bias, -bias_clamp, bias_clamp)``.
        out_scale: multiplies the result.
        hidden_clamp: clamp both gate and up to ``[-hidden_clamp, hidden_clamp]`` first.

    Returns:
        Tensor of gate's shape and dtype (float32 under autocast on CUDA).

    Raises:
        TypeError: gate is not a floating-point tensor, or up has another dtype.
        ValueError: a tensor has another shape or device, or a clamp is not positive.
    """
    check_devices(gate=gate, up=up, weight=weight, bias=bias)
    _check(gate, weight, bias)
    check_clamps("mul_poly_norm", bias_clamp=bias_clamp, hidden_clamp=hidden_clamp)
    if up.shape != gate.shape:
        raise ValueError(
            f"mul_poly_norm: up has shape {tuple(up.shape)} but gate has shape {tuple(gate.shape)}; they must be equal"
        )
    if up.dtype != gate.dtype:
        raise TypeError(f"mul_poly_norm: up is {up.dtype} but gate is {gate.dtype}; they must be equal")
    weight, bias = squash(weight, bias, sigmoid_weight, bias_clamp, out_scale, reference.compute_dtype(gate))
    return _apply(gate, up, weight, bias, eps, group, hidden_clamp)


def squash(
    weight: Tensor,
    bias: Tensor,
    sigmoid_weight: bool,
    bias_clamp: float | None,
    out_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The variants of the four coefficients, in plain PyTorch for autograd."""
    if sigmoid_weight:
        weight = torch.sigmoid(weight.to(dtype))
    if bias_clamp is not None:
        bias = bias.clamp(-bias_clamp, bias_clamp)
    if out_scale != 1.0:
        weight, bias = weight.to(dtype) * out_scale, bias.to(dtype) * out_scale
    return weight, bias


def _apply(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    group: ProcessGroup | None,
    hidden_clamp: float | None,
) -> Tensor:
    if group is not None:
        return operator.poly_norm_sharded(
            x, up, weight, bias, eps, hidden_clamp, ops.result_dtype(x), group.group_name
        )[0]
    if ops.has_implementation(x.device):
        keep = ops.needs_grad(x, up, weight, bias)
        return operator.poly_norm(x, up, weight, bias, eps, hidden_clamp, ops.result_dtype(x), keep)[0]
    if hidden_clamp is not None:
        x, up = x.clamp(-hidden_clamp, hidden_clamp), None if up is None else up.clamp(-hidden_clamp, hidden_clamp)
    out = reference.poly_norm(x, weight, bias, eps=eps)
    return (out if up is None else out * up.to(out.dtype)).to(x.dtype)
