"""The differential epilogue on the CPU.

The backward pass recomputes the difference from the two attention outputs, so that nothing but the
inputs is saved. With ``A = O1 - lambda O2``, ``n = A r``, ``r = (mean(A^2) + eps)^-1/2`` and ``h``
the gradient that reaches n:

    dA = r (h - n mean(h n)),    dO1 = dA
    dO2 = -sum over the group of lambda dA,    dlambda = -<dA, O2>

In the formulas a token is a row, and heads are (Hn, g): lambda (T, Hn, g, 1), noise (T, Hn, 1, Dv),
all else (T, Hn, g, Dv).
"""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.cpu.row_formulas import RowFormula
from motif_kernels.reference import compute_dtype


def _inverse_rms(a: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)


@RowFormula
def _forward(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    gate: Tensor | None,
    *,
    norm_weight: Tensor | None,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor]:
    dtype = compute_dtype(signal)
    a = signal.to(dtype) - noise.to(dtype) * lam.to(dtype)
    if norm_weight is not None:
        a = a * _inverse_rms(a, norm_eps) * norm_weight.to(dtype)
    if gate is not None:
        a = a * torch.sigmoid(gate.to(dtype))
    return ((a * out_scale).to(out_dtype),)


def _gradients(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    gate: Tensor | None,
    *,
    norm_weight: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> tuple[Any, ...]:
    dtype = compute_dtype(signal)
    wide_noise, weight = noise.squeeze(2).to(dtype), None if norm_weight is None else norm_weight.to(dtype)
    d_signal, d_lam, d_gate = [], [], []
    d_noise = torch.zeros_like(wide_noise)
    d_weight = None if weight is None else torch.zeros_like(weight)
    # A group's heads one by one: the compiler then makes one loop of all, the sums over the group
    # included.
    for i in range(signal.shape[2]):
        own_lam = lam[:, :, i].to(dtype)
        a = signal[:, :, i].to(dtype) - wide_noise * own_lam
        g = grad[:, :, i].to(dtype) * out_scale
        if gate is not None:
            s = torch.sigmoid(gate[:, :, i].to(dtype))
            d_gate.append((a * g * s * (1 - s)).to(gate.dtype))
            g = g * s
        if weight is not None and d_weight is not None:
            r = _inverse_rms(a, norm_eps)
            n = a * r
            d_weight = d_weight + (g * n).sum((0, 1))
            g = g * weight
            g = r * (g - n * (g * n).mean(-1, keepdim=True))
        d_signal.append(g.to(signal.dtype))
        d_lam.append(-(g * wide_noise).sum(-1))
        d_noise = d_noise - g * own_lam
    return (
        torch.stack(d_signal, 2),
        d_noise.to(noise.dtype),
        torch.stack(d_lam, 2),
        torch.stack(d_gate, 2) if gate is not None else None,
        d_weight,
    )


_backward = RowFormula(_gradients, sums=1)


def _in_groups(x: Tensor | None, noise_heads: int) -> Tensor | None:
    """(T, H, Dv) as (T, Hn, H / Hn, Dv)."""
    return None if x is None else x.unflatten(1, (noise_heads, -1))


def _lambda_grid(lam: Tensor, signal: Tensor, noise_heads: int) -> Tensor:
    """``lam`` () | (Hs,) | (T, Hs) as a view (T, Hn, g, 1)."""
    return lam.expand(signal.shape[:2]).unflatten(1, (noise_heads, -1)).unsqueeze(-1)


def _joined(x: Tensor, rest: Tensor | None) -> Tensor:
    return x if rest is None else torch.cat((x, rest), dim=-1)


def _cut(x: Tensor, piece: int) -> tuple[Tensor, Tensor | None]:
    """The opposite of :func:`_joined`."""
    if x.shape[-1] == piece:
        return x, None
    return x[..., :piece].contiguous(), x[..., piece:].contiguous()


def forward(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    *,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
    signal_rest: Tensor | None = None,
    noise_rest: Tensor | None = None,
) -> Tensor:
    """The epilogue of signal (T, Hs, Dv) and noise (T, Hn, Dv).

    lam is () | (Hs,) | (T, Hs), norm_weight (Dv,) and gate (T, Hs, Dv). Rests are the last columns
    of heads that come in two pieces.
    """
    signal, noise = _joined(signal, signal_rest), _joined(noise, noise_rest)
    heads = noise.shape[1]
    (out,) = _forward(
        _in_groups(signal, heads),
        noise.unsqueeze(2),
        _lambda_grid(lam, signal, heads),
        _in_groups(gate, heads),
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        out_dtype=out_dtype,
    )
    return out.flatten(1, 2)


def backward(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    *,
    norm_eps: float,
    out_scale: float,
    signal_rest: Tensor | None = None,
    noise_rest: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of signal, noise, lam (of each token and head, (T, Hs)), weight, gate and rests."""
    piece = signal.shape[2]
    signal, noise = _joined(signal, signal_rest), _joined(noise, noise_rest)
    heads = noise.shape[1]
    d_signal, d_noise, d_lam, d_gate, d_weight = _backward(
        _in_groups(grad, heads),
        _in_groups(signal, heads),
        noise.unsqueeze(2),
        _lambda_grid(lam, signal, heads),
        _in_groups(gate, heads),
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
    )
    d_gate = None if d_gate is None else d_gate.flatten(1, 2)
    d_signal, d_signal_rest = _cut(d_signal.flatten(1, 2), piece)
    d_noise, d_noise_rest = _cut(d_noise, piece)
    return d_signal, d_noise, d_lam.flatten(1), d_weight, d_gate, d_signal_rest, d_noise_rest
