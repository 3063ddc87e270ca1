"""RMSNorm (arXiv 1910.07467)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from motif_kernels.checks import check_devices
from motif_kernels.impl.cpu.row_formulas import cpu_kernels, is_large
from motif_kernels.ops import is_exporting
from motif_kernels.ops import rms_norm as operator


def rms_norm(x: Tensor, weight: Tensor | None, eps: float | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    It is torch.nn.functional.rms_norm, except for large arrays on a CPU: PyTorch's is made of many
    operators there, ours of one fused loop each way (where there is a C++ compiler, see
    ``MOTIF_CPU_KERNELS``).

    Args:
        x: (..., N).
        weight: (N,), or None. A float32 weight is not rounded to x's dtype.
        eps: added to the mean square; None for the smallest step from 1 of x's dtype.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x and weight are on different devices, or weight has another shape.
    """
    check_devices(x=x, weight=weight)
    if not x.is_floating_point():
        raise TypeError(f"rms_norm: x has dtype {x.dtype}; it must be a floating-point tensor")
    if x.ndim == 0:
        raise ValueError("rms_norm: x has shape (); it must have a last dimension, which is normalised")
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(
            f"rms_norm: weight has shape {tuple(weight.shape)}; it must be ({x.shape[-1]},), as wide as x's rows"
        )
    if eps is None or not _is_fused(x, weight):
        if weight is None or weight.dtype == x.dtype:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        # PyTorch's fused norms are for one dtype alone.
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        wide = torch.promote_types(x.dtype, weight.dtype)
        return F.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)
    return operator.rms_norm(x, weight, eps)  # type: ignore[no-any-return]


def _is_fused(x: Tensor, weight: Tensor | None) -> bool:
    return (
        type(x) is Tensor  # not a DTensor, whose operators are PyTorch's
        and x.device.type == "cpu"
        and is_large(x)
        and (
            weight is None
            or (type(weight) in (Tensor, Parameter) and (weight.dtype == x.dtype or weight.itemsize <= 4))
        )
        and not torch.compiler.is_compiling()
        and not is_exporting()
        and cpu_kernels() == "inductor"
    )
