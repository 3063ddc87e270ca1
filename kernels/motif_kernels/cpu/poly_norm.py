"""PolyNorm on the CPU, a cache-sized block of rows at a time.

PyTorch's eager formula reads and writes main memory a dozen times and keeps half a dozen intermediates alive for the
backward pass. Here each block of rows is brought into cache once, and the backward pass recomputes the moments
from the inputs, so that nothing but the inputs is saved.

The derivative. With ``n_k = x^k r_k`` and ``r_k = (mean(x^2k) + eps)^-1/2``, for an incoming gradient g:

    d/dx [w n_k] = w k x^(k-1) r_k (g - n_k mean(g n_k)),    d/dw = sum(g n_k),    d/db = sum(g)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import compute_dtype

# x is multiplied by this power of two (exactly) before it is raised to the sixth power and eps is scaled to match: rows
# of any length then stay finite in float32 for |x| up to 1e6, and the products r_k^2 of the backward stay normal
# numbers.
_SCALE = 2.0**-10

# Elements in a block of rows, for each thread: the five float32 buffers of the backward pass take 2.5 MiB. Measured
# with two threads and 2 MiB of second-level cache a core, half and double are level with this on an idle machine;
# smaller blocks lose to the overhead of an operator call, and on a busy machine to waiting for the other thread
# after each.
_BLOCK_ELEMENTS = 1 << 17


class _Block:
    """Powers and inverse root mean squares of one block of rows (R, N), in reused buffers."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype):
        self.x, self.x2, self.x3, self.work, self.grad = (torch.empty(rows, columns, dtype=dtype) for _ in range(5))

    def load(self, source: Tensor, eps: float) -> tuple[Tensor, ...]:
        """Fill the buffers from ``source`` (R', N) and return x, x^2, x^3 and r_1, r_2, r_3 (R', 1)."""
        rows = source.shape[0]
        x, x2, x3 = self.x[:rows], self.x2[:rows], self.x3[:rows]
        torch.mul(_as(x.dtype, source, x), _SCALE, out=x)
        torch.mul(x, x, out=x2)
        torch.mul(x2, x, out=x3)

        # torch's mean adds in a tree; a vector norm would save a pass but loses three bits on rows of 65,536.
        work = self.work[:rows]
        r1 = x2.mean(-1, keepdim=True).add_(eps * _SCALE**2).rsqrt_()
        r2 = torch.mul(x2, x2, out=work).mean(-1, keepdim=True).add_(eps * _SCALE**4).rsqrt_()
        r3 = torch.mul(x3, x3, out=work).mean(-1, keepdim=True).add_(eps * _SCALE**6).rsqrt_()
        return x, x2, x3, r1, r2, r3


def _as(dtype: torch.dtype, source: Tensor, buffer: Tensor) -> Tensor:
    """``source`` in ``dtype``: itself, or converted into ``buffer``."""
    return source if source.dtype == dtype else buffer.copy_(source)


def _horner(x: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, out: Tensor) -> Tensor:
    """``(c2 x + c1) x + c0``, coefficients (R, 1); addcmul is vectorised for one broadcast argument, not for two."""
    torch.mul(x, c2, out=out)
    return torch.addcmul(c0, out.add_(c1), x, out=out)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _block_rows(columns: int) -> int:
    return max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // columns)


@torch.library.custom_op("motif::poly_norm_cpu", mutates_args=(), device_types="cpu")
def _poly_norm(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = compute_dtype(x, up, weight, bias)
    w, b = weight.to(dtype), bias.to(dtype)
    out = torch.empty(x.shape, dtype=x.dtype)
    if x.numel() == 0:
        return out
    xs, outs, ups = _rows(x), _rows(out), None if up is None else _rows(up)
    step = _block_rows(x.shape[-1])
    block = _Block(min(step, len(xs)), x.shape[-1], dtype)
    for start in range(0, len(xs), step):
        rows = slice(start, start + step)
        x_, _, _, r1, r2, r3 = block.load(xs[rows], eps)
        y = _horner(x_, w[2] * r1, w[1] * r2, w[0] * r3, out=block.work[: len(x_)])
        if ups is None:
            torch.addcmul(b, y, x_, out=outs[rows])
        else:
            torch.mul(torch.addcmul(b, y, x_, out=y), ups[rows], out=outs[rows])
    return out


@_poly_norm.register_fake
def _(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("motif::poly_norm_cpu_backward", mutates_args=(), device_types="cpu")
def _poly_norm_backward(
    grad: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, up, weight, bias)
    w, b = weight.to(dtype), bias.to(dtype)
    dx = torch.empty(x.shape, dtype=x.dtype)
    dup = torch.empty(up.shape, dtype=up.dtype) if up is not None else torch.empty(0, dtype=x.dtype)
    if x.numel() == 0:
        return dx, dup, torch.zeros_like(weight), torch.zeros_like(bias)
    xs, grads, dxs = _rows(x), _rows(grad), _rows(dx)
    ups, dups = (None, None) if up is None else (_rows(up), _rows(dup))
    columns = x.shape[-1]
    step = _block_rows(columns)
    block = _Block(min(step, len(xs)), columns, dtype)
    # Sums over columns of g n_3, g n_2, g n_1 and g, a row each: summed over rows at the end, in a fixed order.
    row_sums = torch.empty(4, len(xs), 1, dtype=dtype)
    for start in range(0, len(xs), step):
        rows = slice(start, start + step)
        x_, x2, x3, r1, r2, r3 = block.load(xs[rows], eps)
        work, buffer = block.work[: len(x_)], block.grad[: len(x_)]
        g = _as(dtype, grads[rows], buffer)
        c1, c2, c3 = w[2] * r1, w[1] * r2, w[0] * r3
        if ups is not None and dups is not None:
            y = _horner(x_, c1, c2, c3, out=work)
            torch.addcmul(b, y, x_, out=y)
            torch.mul(y, g, out=dups[rows])
            g = torch.mul(g, ups[rows], out=buffer)
        s3 = torch.sum(torch.mul(g, x3, out=work), -1, keepdim=True).mul_(r3)
        s2 = torch.sum(torch.mul(g, x2, out=work), -1, keepdim=True).mul_(r2)
        s1 = torch.sum(torch.mul(g, x_, out=work), -1, keepdim=True).mul_(r1)
        row_sums[:, rows] = torch.stack((s3, s2, s1, g.sum(-1, keepdim=True)))
        # dx = g (3 c3 x^2 + 2 c2 x + c1) - x (3 c3 r3 m3 x^4 + 2 c2 r2 m2 x^2 + c1 r1 m1), with m_k = mean(g n_k).
        # The factor _SCALE undoes the scaling of x.
        c1, c2, c3 = c1 * _SCALE, 2 * _SCALE * c2, 3 * _SCALE * c3
        _horner(x_, c1, c2, c3, out=work).mul_(g)
        projection = _horner(x2, c1 * r1 * s1 / columns, c2 * r2 * s2 / columns, c3 * r3 * s3 / columns, out=x3)
        torch.addcmul(work, projection, x_, value=-1, out=dxs[rows])
    dw, db = row_sums[:3].sum(dim=(1, 2)), row_sums[3:].sum(dim=(1, 2))
    return dx, dup, dw.to(weight.dtype), db.to(bias.dtype)


@_poly_norm_backward.register_fake
def _(
    grad: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if up is not None else x.new_empty(0)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), dup, weight.new_empty(3), bias.new_empty(1)


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, up, weight, bias, eps = inputs
    ctx.save_for_backward(x, up, weight, bias)
    ctx.eps = eps


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, up, weight, bias = ctx.saved_tensors
    dx, dup, dw, db = _poly_norm_backward(grad, x, up, weight, bias, ctx.eps)
    return dx, (dup if up is not None else None), dw, db, None


_poly_norm.register_autograd(_differentiate, setup_context=_save_inputs)


def poly_norm(x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """PolyNorm of x (..., N), times up (..., N) if given, rounded once to x's dtype."""
    return _poly_norm(x, up, weight, bias, eps)
