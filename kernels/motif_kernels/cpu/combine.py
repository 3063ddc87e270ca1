"""The differential epilogue on the CPU, a cache-sized block of tokens at a time.

The backward pass recomputes the difference from the two attention outputs, so that nothing but the inputs is saved.
With ``A = O1 - lambda O2``, ``n = A r``, ``r = (mean(A^2) + eps)^-1/2`` and ``h`` the gradient that reaches n:

    dA = r (h - n mean(h n)),    dO1 = dA,    dO2 = -sum over the group of lambda dA,    dlambda = -<dA, O2>
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import compute_dtype

# Elements of the signal in a block of tokens, for each thread; see cpu/poly_norm.py.
_BLOCK_ELEMENTS = 1 << 17


def _lambda_grid(lam: Tensor, tokens: int, heads: int, noise_heads: int, dtype: torch.dtype) -> Tensor:
    """``lam`` () | (Hs,) | (T, Hs) as a view that broadcasts to (T, Hn, g, 1)."""
    lam = lam.to(dtype)
    return lam.expand(tokens, heads).reshape(tokens, noise_heads, heads // noise_heads, 1)


def _block_tokens(width: int) -> int:
    return max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // width)


def _difference(signal: Tensor, noise: Tensor, lam: Tensor, out: Tensor) -> Tensor:
    """``signal - lam * noise`` for signal (R, Hn, g, Dv), noise (R, Hn, 1, Dv) and lam (R, Hn, g, 1)."""
    torch.mul(noise.to(out.dtype), lam, out=out)
    return torch.sub(signal, out, out=out)


def _inverse_rms(a: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(a, dim=-1, keepdim=True).square_().div_(a.shape[-1]).add_(eps).rsqrt_()


@torch.library.custom_op("motif::diff_combine_cpu", mutates_args=(), device_types="cpu")
def _diff_combine(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> Tensor:
    # signal (T, Hs, Dv), noise (T, Hn, Dv), lam () | (Hs,) | (T, Hs), norm_weight (Dv,), gate (T, Hs, Dv)
    out = torch.empty(signal.shape, dtype=signal.dtype)
    if signal.numel() == 0:
        return out
    dtype = compute_dtype(signal, noise, lam)
    tokens, heads, width = signal.shape
    groups = (noise.shape[1], heads // noise.shape[1])
    lam = _lambda_grid(lam, tokens, heads, noise.shape[1], dtype)
    weight = None if norm_weight is None else norm_weight.to(dtype) * out_scale
    step = _block_tokens(heads * width)
    buffer = torch.empty(min(step, tokens), *groups, width, dtype=dtype)
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        signal_ = signal[block].unflatten(1, groups)
        a = _difference(signal_, noise[block].unsqueeze(2), lam[block], out=buffer[: len(signal_)])
        if weight is not None:
            a.mul_(_inverse_rms(a, norm_eps)).mul_(weight)
        elif out_scale != 1.0:
            a.mul_(out_scale)
        if gate is not None:
            a.mul_(torch.sigmoid(gate[block].to(dtype)).unflatten(1, groups))
        out[block] = a.flatten(1, 2)
    return out


@_diff_combine.register_fake
def _(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> Tensor:
    return torch.empty(signal.shape, dtype=signal.dtype, device=signal.device)


@torch.library.custom_op("motif::diff_combine_cpu_backward", mutates_args=(), device_types="cpu")
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
    """Gradients of signal, noise, lam (per token and head), norm_weight and gate; the last two empty if not given."""
    dtype = compute_dtype(signal, noise, lam)
    tokens, heads, width = signal.shape
    groups = (noise.shape[1], heads // noise.shape[1])
    d_signal = torch.empty(signal.shape, dtype=signal.dtype)
    d_noise = torch.empty(noise.shape, dtype=noise.dtype)
    d_lam = torch.empty(tokens, heads, dtype=dtype)
    d_weight = torch.zeros(width if norm_weight is not None else 0, dtype=dtype)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype) if gate is not None else signal.new_empty(0)
    if signal.numel() == 0:
        return d_signal, d_noise, d_lam, d_weight, d_gate
    lam = _lambda_grid(lam, tokens, heads, noise.shape[1], dtype)
    weight = None if norm_weight is None else norm_weight.to(dtype)
    step = _block_tokens(heads * width)
    buffers = torch.empty(3, min(step, tokens), *groups, width, dtype=dtype)
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        signal_ = signal[block].unflatten(1, groups)
        a, g, work = buffers[:, : len(signal_)]
        noise_ = noise[block].to(dtype).unsqueeze(2)
        torch.mul(grad[block].unflatten(1, groups).to(dtype), out_scale, out=g)
        if gate is not None:
            a = _difference(signal_, noise_, lam[block], out=a)
            s = torch.sigmoid(gate[block].to(dtype)).unflatten(1, groups)
            # d sigmoid = s (1 - s)
            d_gate[block] = torch.mul(a, g, out=work).mul_(s).mul_(1 - s).flatten(1, 2)
            g.mul_(s)
        if weight is not None:
            a = _difference(signal_, noise_, lam[block], out=a)
            r = _inverse_rms(a, norm_eps)
            n = a.mul_(r)
            d_weight += torch.mul(g, n, out=work).sum(dim=(0, 1, 2))
            g.mul_(weight)
            mean = torch.mul(g, n, out=work).mean(-1, keepdim=True)
            g.sub_(n.mul_(mean)).mul_(r)
        d_signal[block] = g.flatten(1, 2)
        d_lam[block] = torch.mul(g, noise_, out=work).sum(-1).neg_().flatten(1, 2)
        d_noise[block] = torch.mul(g, lam[block], out=work).sum(2).neg_()
    return d_signal, d_noise, d_lam, d_weight, d_gate


@_diff_combine_backward.register_fake
def _(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(signal, noise, lam)
    return (
        signal.new_empty(signal.shape),
        noise.new_empty(noise.shape),
        signal.new_empty(signal.shape[:2], dtype=dtype),
        signal.new_empty(signal.shape[-1] if norm_weight is not None else 0, dtype=dtype),
        gate.new_empty(gate.shape) if gate is not None else signal.new_empty(0),
    )


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.norm_eps, ctx.out_scale = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, noise, lam, norm_weight, gate = ctx.saved_tensors
    d_signal, d_noise, d_lam, d_weight, d_gate = _diff_combine_backward(
        grad,
        signal,
        noise,
        lam,
        norm_weight,
        gate,
        ctx.norm_eps,
        ctx.out_scale,
    )
    return (
        d_signal,
        d_noise,
        d_lam.sum_to_size(lam.shape).to(lam.dtype),
        d_weight.to(norm_weight.dtype) if norm_weight is not None else None,
        d_gate if gate is not None else None,
        None,
        None,
    )


_diff_combine.register_autograd(_differentiate, setup_context=_save_inputs)


def diff_combine(
    o_signal: Tensor,
    o_noise: Tensor,
    lam: Tensor,
    *,
    norm_weight: Tensor | None,
    norm_eps: float,
    out_scale: float,
    gate: Tensor | None,
) -> Tensor:
    """The epilogue for tensors of any leading shape; see :func:`motif_kernels.diff_combine`."""
    return _diff_combine(
        o_signal.flatten(0, -3),
        o_noise.flatten(0, -3),
        lam.flatten(0, -2) if lam.ndim > 1 else lam,
        norm_weight,
        gate.flatten(0, -3) if gate is not None else None,
        norm_eps,
        out_scale,
    ).view(o_signal.shape)
