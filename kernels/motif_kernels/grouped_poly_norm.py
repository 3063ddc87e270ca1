"""PolyNorm with coefficients of each expert, times the feed-forward's other branch."""

import torch
from torch import Tensor

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices, check_offsets
from motif_kernels.ops import grouped_poly_norm as operator
from motif_kernels.poly_norm import check_clamps, squash


def grouped_mul_poly_norm(
    gate: Tensor,
    up: Tensor | None,
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
        up: (T, N), the other branch, of gate's dtype. None where gate is (T, 2 N) and holds both,
            itself first: their gradients then are one tensor too, without a copy.
        weight: (E, 3), in the order of gate^3, gate^2, gate.
        bias: (E, 1).
        offsets: (E,) int32, as in :func:`~motif_kernels.grouped_linear`.
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
    _check(gate, up, weight, bias, offsets)
    check_clamps("grouped_mul_poly_norm", bias_clamp=bias_clamp, hidden_clamp=hidden_clamp)
    weight, bias = squash(weight, bias, sigmoid_weight, bias_clamp, out_scale, reference.compute_dtype(gate))
    out_clamp = None if hidden_clamp is None else hidden_clamp * abs(out_scale)
    dtype = ops.result_dtype(gate)
    if not ops.has_implementation(gate.device):
        return _plain(gate, up, weight, bias, offsets, eps, hidden_clamp, out_clamp).to(dtype)
    keep = ops.needs_grad(gate, up, weight, bias)
    numbers = eps, hidden_clamp, out_clamp, dtype, keep
    return operator.grouped_poly_norm(gate, up, weight, bias, offsets, *numbers)[0]  # type: ignore[no-any-return]


def grouped_mul_poly_norm_mxfp8(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    *,
    eps: float = 1e-6,
    sigmoid_weight: bool = False,
    bias_clamp: float | None = None,
    out_scale: float = 1.0,
    hidden_clamp: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`grouped_mul_poly_norm` in MXFP8, for a product in 8 bits that follows; without a
    derivative.

    Bit for bit what :func:`motif_kernels.reference.to_mxfp8`, and torchao's ``to_mx`` with RCEIL,
    make of the result in gate's dtype, which here is never in memory. torchao's grouped product
    takes them as ``MXTensor.from_qdata_and_scales(values, scales, gate.dtype)``.

    Arguments are those of :func:`grouped_mul_poly_norm`; N must be a multiple of 32.

    Returns:
        Values (T, N) float8_e4m3fn, and for 32 columns each a scale (T, N / 32) float8_e8m0fnu.

    Raises:
        TypeError: as there.
        ValueError: as there, or another N.
    """
    _check(gate, up, weight, bias, offsets)
    check_clamps("grouped_mul_poly_norm_mxfp8", bias_clamp=bias_clamp, hidden_clamp=hidden_clamp)
    columns = gate.shape[1] // (2 if up is None else 1)
    if columns % 32:
        raise ValueError(f"grouped_mul_poly_norm_mxfp8: N is {columns}; it must be a multiple of 32")
    weight, bias = squash(weight, bias, sigmoid_weight, bias_clamp, out_scale, reference.compute_dtype(gate))
    out_clamp = None if hidden_clamp is None else hidden_clamp * abs(out_scale)
    with torch.no_grad():
        if not ops.has_implementation(gate.device):
            out = _plain(gate, up, weight, bias, offsets, eps, hidden_clamp, out_clamp)
            return reference.to_mxfp8(out.to(gate.dtype))
        values, scales = operator.grouped_poly_norm_mxfp8(gate, up, weight, bias, offsets, eps, hidden_clamp, out_clamp)
    return values, scales


def _plain(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None,
) -> Tensor:
    """For devices without an operator, not rounded."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    if hidden_clamp is not None:
        gate, up = (t.clamp(-hidden_clamp, hidden_clamp) for t in (gate, up))
    out = reference.grouped_mul_poly_norm(gate, up, weight, bias, offsets, eps=eps)
    return out if out_clamp is None else out.clamp(-out_clamp, out_clamp)


def _check(gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, offsets: Tensor) -> None:
    name = "grouped_mul_poly_norm"
    check_devices(gate=gate, up=up, weight=weight, bias=bias, offsets=offsets)
    if not gate.is_floating_point() or (up is not None and up.dtype != gate.dtype):
        found = f"gate is {gate.dtype}" + ("" if up is None else f" and up {up.dtype}")
        raise TypeError(f"{name}: {found}; they must be one floating-point dtype")
    halves = 2 if up is None else 1
    if gate.ndim != 2 or gate.shape[1] == 0 or gate.shape[1] % halves:
        width = "2 N" if up is None else "N"
        raise ValueError(f"{name}: gate has shape {tuple(gate.shape)}; it must be (T, {width}) with N of 1 or more")
    if up is not None and up.shape != gate.shape:
        raise ValueError(f"{name}: up has shape {tuple(up.shape)} but gate has {tuple(gate.shape)}; they must be equal")
    experts = weight.shape[0] if weight.ndim else 0
    if tuple(weight.shape) != (experts, 3) or tuple(bias.shape) != (experts, 1):
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)} and bias {tuple(bias.shape)}; they must be (experts, 3) "
            "and (experts, 1)"
        )
    check_offsets(name, offsets, experts, len(gate))
