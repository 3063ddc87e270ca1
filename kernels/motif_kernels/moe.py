"""What the experts of a mixture compute, for rows that are sorted by expert."""

import itertools

import torch
from torch import Tensor

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices, may_read
from motif_kernels.ops import moe as operator
from motif_kernels.poly_norm import check_clamps, squash


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
    _check_offsets("grouped_linear", offsets, len(weight), len(x))
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"grouped_linear: x is {x.dtype} and weight {weight.dtype}; they must be equal")
    if ops.is_exporting():
        return reference.grouped_linear(x, weight, offsets)
    return operator.grouped_product(x, weight, offsets, True)  # type: ignore[no-any-return]


def grouped_mul_poly_norm(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    *,
    eps: float = 1e-6,
    sigmoid_weight: bool = False,
    bias_clamp: float | None = None,
    out_scale: float = 1.0,
    hidden_clamp: float | None = None,
) -> Tensor:
    """``poly_norm(gate) * up`` of rows that are sorted by expert, each with its expert's weight and
    bias, rounded once after the product.

    Moments are those of a row, so rows of no expert enter none.

    Args:
        gate: (T, N), the branch that PolyNorm is applied to.
        up: (T, N), the other branch, of gate's dtype.
        weight: (E, 3), in the order of gate^3, gate^2, gate.
        bias: (E, 1).
        offsets: (E,) int32, as in :func:`grouped_linear`.
        eps: added to each mean square.
        sigmoid_weight: use ``sigmoid(weight)``.
        bias_clamp: use ``clamp(bias, -bias_clamp, bias_clamp)``.
        out_scale: multiplies the result.
        hidden_clamp: clamp gate, up and, before out_scale, the product to ``[-hidden_clamp,
            hidden_clamp]``.

    Returns:
        (T, N), of gate's dtype (float32 under autocast on CUDA); 0 in rows of no expert, which pass
        no gradient.

    Raises:
        TypeError: gate is not a floating-point tensor, up has another dtype, or offsets is not
            int32.
        ValueError: shapes or devices that do not fit, a clamp that is not positive, or on a CPU
            offsets that fall or pass T.
    """
    check_devices(gate=gate, up=up, weight=weight, bias=bias, offsets=offsets)
    if not gate.is_floating_point() or up.dtype != gate.dtype:
        raise TypeError(
            f"grouped_mul_poly_norm: gate is {gate.dtype} and up {up.dtype}; they must be one floating-point dtype"
        )
    experts = weight.shape[0] if weight.ndim else 0
    shapes = {"up": (up, tuple(gate.shape)), "weight": (weight, (experts, 3)), "bias": (bias, (experts, 1))}
    for name, (tensor, expected) in shapes.items():
        if gate.ndim != 2 or gate.shape[1] == 0 or tuple(tensor.shape) != expected:
            raise ValueError(
                f"grouped_mul_poly_norm: {name} has shape {tuple(tensor.shape)} and gate {tuple(gate.shape)}; gate and "
                "up must be (T, N) with N of 1 or more, weight (experts, 3) and bias (experts, 1)"
            )
    check_clamps("grouped_mul_poly_norm", bias_clamp=bias_clamp, hidden_clamp=hidden_clamp)
    _check_offsets("grouped_mul_poly_norm", offsets, experts, len(gate))
    weight, bias = squash(weight, bias, sigmoid_weight, bias_clamp, out_scale, reference.compute_dtype(gate))
    if gate.device.type in ("cpu", "meta") and not ops.is_exporting():
        keep = ops.needs_grad(gate, up, weight, bias)
        numbers = eps, hidden_clamp, ops.result_dtype(gate), keep
        out: Tensor = operator.grouped_poly_norm(gate, up, weight, bias, offsets, *numbers)[0]
    else:
        if hidden_clamp is not None:
            gate, up = (t.clamp(-hidden_clamp, hidden_clamp) for t in (gate, up))
        out = reference.grouped_mul_poly_norm(gate, up, weight, bias, offsets, eps=eps).to(ops.result_dtype(gate))
    if hidden_clamp is not None:
        bound = hidden_clamp * abs(out_scale)
        out = out.clamp(-bound, bound)
    return out


def _check_offsets(function: str, offsets: Tensor, experts: int, rows: int) -> None:
    if offsets.dtype != torch.int32:
        raise TypeError(f"{function}: offsets is {offsets.dtype}; it must be int32")
    if experts < 1 or tuple(offsets.shape) != (experts,):
        raise ValueError(
            f"{function}: offsets has shape {tuple(offsets.shape)}; it must be ({experts},), where the rows of each of "
            f"the {experts} experts end"
        )
    if not may_read(offsets):
        return
    ends = [0, *offsets.tolist()]
    if any(end < start for start, end in itertools.pairwise(ends)) or ends[-1] > rows:
        raise ValueError(
            f"{function}: offsets is {ends[1:]}; it must be of 0 or more, never fall and end within the {rows} rows"
        )
