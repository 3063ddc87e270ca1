"""RMSNorm on the CPU (arXiv 1910.07467); the backward pass recomputes the moment."""

import torch
from torch import Tensor

from motif_kernels.impl.cpu.row_formulas import RowFormula
from motif_kernels.reference import compute_dtype


@RowFormula
def forward(x: Tensor, *, weight: Tensor | None, eps: float) -> tuple[Tensor]:
    """RMSNorm of x (R, N), rounded once."""
    wide = x.to(compute_dtype(x))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((y if weight is None else y * weight).to(x.dtype),)


def _backward(grad: Tensor, x: Tensor, *, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    dtype = compute_dtype(x)
    wide, g = x.to(dtype), grad.to(dtype)
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    n = wide * r
    h = g if weight is None else g * weight
    dx = r * (h - n * (h * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), None if weight is None else (g * n).sum(0)


backward = RowFormula(_backward, sums=1)
