"""The differential epilogue on the CPU, a cache-sized block of tokens at a time.

The backward pass recomputes the difference from the two attention outputs, so that nothing but the
inputs is saved. With ``A = O1 - lambda O2``, ``n = A r``, ``r = (mean(A^2) + eps)^-1/2`` and ``h``
the gradient that reaches n:

    dA = r (h - n mean(h n)),    dO1 = dA
    dO2 = -sum over the group of lambda dA,    dlambda = -<dA, O2>
"""

import torch
from torch import Tensor

from motif_kernels.reference import compute_dtype

# Elements of the signal in a block of tokens, for each thread; see cpu/poly_norm.py.
_BLOCK_ELEMENTS = 1 << 17


def _lambda_grid(lam: Tensor, tokens: int, heads: int, noise_heads: int, dtype: torch.dtype) -> Tensor:
    """``lam`` () | (Hs,) | (T, Hs) as a view that broadcasts to (T, Hn, g, 1)."""
    lam = lam.to(dtype)
    return lam.expand(tokens, heads).reshape(tokens, noise_heads, heads // noise_heads, 1)


def _block_tokens(width: int) -> int:
    return max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // width)


def _difference(signal: Tensor, noise: Tensor, lam: Tensor, out: Tensor) -> Tensor:
    """``signal - lam * noise`` for signal (R, Hn, g, Dv), noise (R, Hn, 1, Dv) and lam
    (R, Hn, g, 1).
    """
    torch.mul(noise.to(out.dtype), lam, out=out)
    return torch.sub(signal, out, out=out)


def _inverse_rms(a: Tensor, eps: float, work: Tensor) -> Tensor:
    return torch.mul(a, a, out=work).mean(-1, keepdim=True).add_(eps).rsqrt_()


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
) -> Tensor:
    """The epilogue of signal (T, Hs, Dv) and noise (T, Hn, Dv).

    lam is () | (Hs,) | (T, Hs), norm_weight (Dv,) and gate (T, Hs, Dv).
    """
    out = torch.empty(signal.shape, dtype=out_dtype)
    dtype = compute_dtype(signal)
    tokens, heads, width = signal.shape
    groups = (noise.shape[1], heads // noise.shape[1])
    lam = _lambda_grid(lam, tokens, heads, noise.shape[1], dtype)
    weight = None if norm_weight is None else norm_weight.to(dtype) * out_scale
    step = _block_tokens(heads * width)
    buffers = torch.empty(2, min(step, tokens), *groups, width, dtype=dtype)
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        signal_ = signal[block].unflatten(1, groups)
        a, work = buffers[:, : len(signal_)]
        a = _difference(signal_, noise[block].unsqueeze(2), lam[block], out=a)
        if weight is not None:
            a.mul_(_inverse_rms(a, norm_eps, work)).mul_(weight)
        elif out_scale != 1.0:
            a.mul_(out_scale)
        if gate is not None:
            a.mul_(torch.sigmoid(gate[block].to(dtype)).unflatten(1, groups))
        out[block] = a.flatten(1, 2)
    return out


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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of signal, noise, lam (per token and head, (T, Hs)), norm_weight and gate."""
    dtype = compute_dtype(signal)
    tokens, heads, width = signal.shape
    groups = (noise.shape[1], heads // noise.shape[1])
    d_signal = torch.empty(signal.shape, dtype=signal.dtype)
    d_noise = torch.empty(noise.shape, dtype=noise.dtype)
    d_lam = torch.empty(tokens, heads, dtype=dtype)
    d_weight = torch.zeros(width, dtype=dtype) if norm_weight is not None else None
    d_gate = torch.empty(gate.shape, dtype=gate.dtype) if gate is not None else None
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
        if gate is not None and d_gate is not None:
            a = _difference(signal_, noise_, lam[block], out=a)
            s = torch.sigmoid(gate[block].to(dtype)).unflatten(1, groups)
            # d sigmoid = s (1 - s)
            d_gate[block] = torch.mul(a, g, out=work).mul_(s).mul_(1 - s).flatten(1, 2)
            g.mul_(s)
        if weight is not None and d_weight is not None:
            a = _difference(signal_, noise_, lam[block], out=a)
            r = _inverse_rms(a, norm_eps, work)
            n = a.mul_(r)
            d_weight += torch.mul(g, n, out=work).sum(dim=(0, 1, 2))
            g.mul_(weight)
            mean = torch.mul(g, n, out=work).mean(-1, keepdim=True)
            g.sub_(n.mul_(mean)).mul_(r)
        d_signal[block] = g.flatten(1, 2)
        d_lam[block] = torch.mul(g, noise_, out=work).sum(-1).neg_().flatten(1, 2)
        d_noise[block] = torch.mul(g, lam[block], out=work).sum(2).neg_()
    return d_signal, d_noise, d_lam, d_weight, d_gate
