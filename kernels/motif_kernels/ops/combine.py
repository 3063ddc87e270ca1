"""The differential epilogue: signal - lambda * noise, then sub-norm, gate or neither."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.reference import compute_dtype

FAMILY = "combine"


def _dense(x: Tensor) -> Tensor:
    """X (T, H, Dv) with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@torch.library.custom_op("motif::diff_combine", mutates_args=())
def diff_combine(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """Epilogue of (T, Hs, Dv), (T, Hn, Dv); lam () | (Hs,) | (T, Hs), gate (T, Hs, Dv)."""
    if signal.numel() == 0:
        return torch.empty(signal.shape, dtype=out_dtype, device=signal.device)
    with torch.cuda.device_of(signal):
        return implementation(FAMILY, signal.device).forward(
            _dense(signal),
            _dense(noise),
            lam,
            norm_weight,
            None if gate is None else _dense(gate),
            norm_eps=norm_eps,
            out_scale=out_scale,
            out_dtype=out_dtype,
        )


@diff_combine.register_fake
def _(signal: Tensor, *arguments: Any) -> Tensor:
    *_, out_dtype = arguments
    return torch.empty(signal.shape, dtype=out_dtype, device=signal.device)


@torch.library.custom_op("motif::diff_combine_backward", mutates_args=())
def _diff_combine_backward(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of signal, noise, lam (T, Hs), norm_weight, gate; the last may be empty."""
    if signal.numel() == 0:
        zeros = signal.new_zeros(signal.shape[-1] if norm_weight is not None else 0, dtype=compute_dtype(signal))
        d_lam = signal.new_zeros(signal.shape[:2], dtype=compute_dtype(signal))
        return torch.empty_like(signal), torch.zeros_like(noise), d_lam, zeros, signal.new_empty(0)
    with torch.cuda.device_of(signal):
        d_signal, d_noise, d_lam, d_weight, d_gate = implementation(FAMILY, signal.device).backward(
            _dense(grad),
            _dense(signal),
            _dense(noise),
            lam,
            norm_weight,
            None if gate is None else _dense(gate),
            norm_eps=norm_eps,
            out_scale=out_scale,
        )
    # An operator cannot return None.
    return (
        d_signal,
        d_noise,
        d_lam,
        d_weight if d_weight is not None else d_lam.new_empty(0),
        d_gate if d_gate is not None else signal.new_empty(0),
    )


@_diff_combine_backward.register_fake
def _(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(signal)
    return (
        signal.new_empty(signal.shape),
        noise.new_empty(noise.shape),
        signal.new_empty(signal.shape[:2], dtype=dtype),
        signal.new_empty(signal.shape[-1] if norm_weight is not None else 0, dtype=dtype),
        gate.new_empty(gate.shape) if gate is not None else signal.new_empty(0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_eps, ctx.out_scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, noise, lam, norm_weight, gate = ctx.saved_tensors
    d_signal, d_noise, d_lam, d_weight, d_gate = _diff_combine_backward(
        grad, signal, noise, lam, norm_weight, gate, ctx.norm_eps, ctx.out_scale
    )
    return (
        d_signal,
        d_noise,
        d_lam.sum_to_size(lam.shape).to(lam.dtype),
        d_weight.to(norm_weight.dtype) if norm_weight is not None else None,
        d_gate if gate is not None else None,
        None,
        None,
        None,
    )


diff_combine.register_autograd(_differentiate, setup_context=_save)
