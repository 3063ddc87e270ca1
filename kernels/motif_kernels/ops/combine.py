"""The differential epilogue: signal - lambda * noise, then sub-norm, gate or neither."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import compute_dtype

FAMILY = "combine"


def _dense(x: Tensor) -> Tensor:
    """X (T, H, Dv) with a contiguous last dimension."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
    signal_rest: Tensor | None,
    noise_rest: Tensor | None,
) -> Tensor:
    """Epilogue of (T, Hs, Dv), (T, Hn, Dv); lam () | (Hs,) | (T, Hs), gate (T, Hs, Dv).

    Heads may come in two pieces, equally wide: with rests, signal and noise hold the first.
    """
    if signal.numel() == 0:
        return _empty_output(signal, signal_rest, out_dtype)
    signal, noise, signal_rest, noise_rest = _dense_pieces(signal, noise, signal_rest, noise_rest)
    with torch.cuda.device_of(signal):
        return implementation(FAMILY, signal.device).forward(
            signal,
            noise,
            lam,
            norm_weight,
            None if gate is None else _dense(gate),
            norm_eps=norm_eps,
            out_scale=out_scale,
            out_dtype=out_dtype,
            signal_rest=signal_rest,
            noise_rest=noise_rest,
        )


_operator = torch.library.custom_op("motif::diff_combine", _forward, mutates_args=())


def _dense_pieces(
    signal: Tensor, noise: Tensor, signal_rest: Tensor | None, noise_rest: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """As kernels take them; two pieces step alike."""
    if signal_rest is None or noise_rest is None:
        return _dense(signal), _dense(noise), None, None
    return signal.contiguous(), noise.contiguous(), signal_rest.contiguous(), noise_rest.contiguous()


def _empty_output(signal: Tensor, rest: Tensor | None, dtype: torch.dtype) -> Tensor:
    columns = signal.shape[-1] + (0 if rest is None else rest.shape[-1])
    return torch.empty(*signal.shape[:-1], columns, dtype=dtype, device=signal.device)


@_operator.register_fake
def _(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
    signal_rest: Tensor | None,
    noise_rest: Tensor | None,
) -> Tensor:
    return _empty_output(signal, signal_rest, out_dtype)


def _backward(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
    signal_rest: Tensor | None,
    noise_rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of signal, noise, lam (T, Hs), norm_weight, gate and rests; of None, empty ones."""
    if signal.numel() == 0:
        d_gate, *d_rests = (signal.new_zeros(0 if t is None else t.shape) for t in (gate, signal_rest, noise_rest))
        columns = 0 if norm_weight is None else len(norm_weight)
        d_lam, d_weight = (
            signal.new_zeros(shape, dtype=compute_dtype(signal)) for shape in (signal.shape[:2], columns)
        )
        return torch.empty_like(signal), torch.zeros_like(noise), d_lam, d_weight, d_gate, d_rests[0], d_rests[1]
    signal, noise, signal_rest, noise_rest = _dense_pieces(signal, noise, signal_rest, noise_rest)
    with torch.cuda.device_of(signal):
        d_signal, d_noise, d_lam, d_weight, *others = implementation(FAMILY, signal.device).backward(
            _dense(grad),
            signal,
            noise,
            lam,
            norm_weight,
            None if gate is None else _dense(gate),
            norm_eps=norm_eps,
            out_scale=out_scale,
            signal_rest=signal_rest,
            noise_rest=noise_rest,
        )
    # An operator cannot return None.
    d_gate, d_signal_rest, d_noise_rest = (signal.new_empty(0) if t is None else t for t in others)
    d_weight = d_lam.new_empty(0) if d_weight is None else d_weight
    return d_signal, d_noise, d_lam, d_weight, d_gate, d_signal_rest, d_noise_rest


_backward_operator = torch.library.custom_op("motif::diff_combine_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_backward_operator.register_fake
def _(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
    signal_rest: Tensor | None,
    noise_rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(t: Tensor | None) -> Tensor:
        return signal.new_empty(0) if t is None else t.new_empty(t.shape)

    dtype = compute_dtype(signal)
    d_lam = signal.new_empty(signal.shape[:2], dtype=dtype)
    d_weight = signal.new_empty(0 if norm_weight is None else norm_weight.shape[0], dtype=dtype)
    return like(signal), like(noise), d_lam, d_weight, like(gate), like(signal_rest), like(noise_rest)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.norm_eps, ctx.out_scale, _, signal_rest, noise_rest = inputs
    ctx.save_for_backward(*tensors, signal_rest, noise_rest)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, noise, lam, norm_weight, gate, *rests = ctx.saved_tensors
    d_signal, d_noise, d_lam, d_weight, d_gate, *d_rests = _run_backward(
        grad, signal, noise, lam, norm_weight, gate, ctx.norm_eps, ctx.out_scale, *rests
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
        *(d if rest is not None else None for d, rest in zip(d_rests, rests, strict=True)),
    )


diff_combine = differentiable(_operator, _forward, _save, _differentiate)
