"""The error rule that every backend is held to, and tensors that look like a model's."""

import torch
from torch import Tensor


def assert_error_rule(
    result: Tensor, plain: Tensor, exact: Tensor, *, precision: torch.dtype | None = None, floor: float | None = None
) -> None:
    """At most twice the largest error of ``plain`` PyTorch at ``precision``, and its RMS error.

    The first half is the rule of FlashAttention's own tests. ``floor`` allows for rounding: two
    units in the last place of the largest value or of 1, for a gradient that is 0 by cancellation
    is not 0 in floating point.
    """
    result, plain, exact = result.detach(), plain.detach(), exact.detach().double()
    if exact.numel() == 0:
        return
    if floor is None:
        floor = torch.finfo(precision or result.dtype).eps * 2 * exact.abs().max().clamp(min=1).item()
    error = (result.double() - exact).abs()
    allowed = 2 * (plain.double() - exact).abs().max().item() + floor
    assert torch.isfinite(result).all()
    assert error.max().item() <= allowed, f"error {error.max().item():.3e} > {allowed:.3e}"
    if exact.numel() < 256:
        return  # the root mean square of a few rounding errors is luck
    rms_error, rms_plain = (difference.square().mean().sqrt().item() for difference in (error, plain.double() - exact))
    rms_allowed = rms_plain + floor / 2
    assert rms_error <= rms_allowed, f"RMS error {rms_error:.3e} > {rms_allowed:.3e}"


def leaves(*tensors: Tensor | float | None, dtype: torch.dtype | None = None) -> list:
    """Detached copies that require gradients (None and floats pass through)."""
    return [
        t.detach().to(dtype or t.dtype, copy=True).requires_grad_() if isinstance(t, Tensor) else t for t in tensors
    ]


def gradients(out: Tensor, inputs: list, grad: Tensor) -> list[Tensor]:
    """Gradients of ``out`` with respect to the tensors among ``inputs``."""
    return list(torch.autograd.grad(out, [t for t in inputs if isinstance(t, Tensor)], grad.to(out.dtype)))
