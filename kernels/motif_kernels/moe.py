"""The matrix products of a mixture's experts, for rows that are sorted by expert."""

import torch
from torch import Tensor

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices, check_offsets
from motif_kernels.ops import moe as operator


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``x @ weight[e].T`` for the rows of each expert e.

    Rows are sorted by expert. On a CUDA GPU bfloat16 goes through torch's ``grouped_mm``, for which
    nothing waits for the device; other dtypes are a product for each expert. Under autocast x and
    weight are cast, as for a linear layer.

    Args:
        x: (T, K).
        weight: (E, N, K), a matrix for each expert.
        offsets: (E,) int32: expert e's rows end before ``offsets[e]`` and begin where those of the
            expert before end. Rows past the last are of no expert and may hold anything.

    Returns:
        (T, N), of x's dtype; 0 in rows of no expert, which pass no gradient.

    Raises:
        TypeError: x and weight have different dtypes, or offsets is not int32.
        ValueError: shapes or devices that do not fit, or on a CPU offsets that fall or pass T.
    """
    check_devices(x=x, weight=weight, offsets=offsets)
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"grouped_linear: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; they must be (T, K) and "
            "(experts, N, K)"
        )
    check_offsets("grouped_linear", offsets, len(weight), len(x))
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"grouped_linear: x is {x.dtype} and weight {weight.dtype}; they must be equal")
    if ops.is_exporting():
        return reference.grouped_linear(x, weight, offsets)
    return operator.grouped_product(x, weight, offsets, True)  # type: ignore[no-any-return]
