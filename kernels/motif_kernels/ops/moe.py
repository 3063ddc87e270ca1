"""Rows that are sorted by expert: products with their experts' matrices, and PolyNorm with their
experts' coefficients.

``offsets`` (E,) int32 are where each expert's rows end; those of the next begin there. Rows past
the last are of no expert: what they hold is not used, and what comes out of them is 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.impl.cpu import poly_norm as cpu
from motif_kernels.ops.poly_norm import as_rows, empty_inverse_rms
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import rows_of_groups


def _torch_serves(*matrices: Tensor) -> bool:
    """Whether torch's grouped_mm multiplies these without the host knowing the offsets."""
    return all(
        t.is_cuda and t.dtype == torch.bfloat16 and max(t.stride()[-2:]) * t.element_size() % 16 == 0 for t in matrices
    )


def _product(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    """Rows (T, K) times each row's expert's matrix: (E, N, K) transposed, else (E, K, N)."""
    matrices = weight.transpose(1, 2) if transposed else weight
    if _torch_serves(x, matrices):
        out = F.grouped_mm(x, matrices, offs=offsets)  # rows past the last offset are not written
        return out.masked_fill_(rows_of_groups(offsets, len(x))[1][:, None], 0)
    out, start = x.new_empty(len(x), matrices.shape[2]), 0
    for matrix, end in zip(matrices.unbind(0), offsets.tolist(), strict=True):
        torch.mm(x[start:end], matrix, out=out[start:end])
        start = end
    out[start:] = 0
    return out


def _weight_gradient(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """The sum of ``grad[t] x[t]^T`` over each expert's rows: (T, N) and (T, K) to (E, N, K)."""
    if _torch_serves(grad, x):
        out = F.grouped_mm(grad.T, x, offs=offsets)
        # On Blackwell an expert without rows got numbers (pytorch#172439).
        idle = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return out.masked_fill_(idle[:, None, None], 0)
    out, start = x.new_empty(len(offsets), grad.shape[1], x.shape[1]), 0
    for sums, end in zip(out.unbind(0), offsets.tolist(), strict=True):
        torch.mm(grad[start:end].T, x[start:end], out=sums)
        start = end
    return out


_product_operator = torch.library.custom_op("motif::grouped_product", _product, mutates_args=())
_weight_operator = torch.library.custom_op("motif::grouped_weight_gradient", _weight_gradient, mutates_args=())
_run_product = with_shortcut(_product_operator, _product)
_run_weight_gradient = with_shortcut(_weight_operator, _weight_gradient)


@_product_operator.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@_weight_operator.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.transposed = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_product(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, offsets = ctx.saved_tensors
    dx = dw = None
    grad = grad.contiguous()
    if ctx.needs_input_grad[0]:
        dx = _run_product(grad, weight, offsets, not ctx.transposed)
    if ctx.needs_input_grad[1]:
        dw = _run_weight_gradient(*((grad, x) if ctx.transposed else (x, grad)), offsets)
    return dx, dw, None, None


grouped_product = differentiable(_product_operator, _product, _save_product, _differentiate_product)


def _pad(t: Tensor, rows: int) -> Tensor:
    """With rows of zeros behind."""
    return t if len(t) == rows else F.pad(t, (0, 0, 0, rows - len(t)))


def _forward(
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_dtype: torch.dtype,
    keep_inverse_rms: bool,
) -> tuple[Tensor, Tensor]:
    """PolyNorm of gate (T, N) times up, with weight (E, 3) and bias (E, 1), on the CPU; and for the
    backward pass the inverse root mean squares (T, 3), if they are to be kept.
    """
    rows, end = len(gate), int(offsets[-1])
    if end == 0 or gate.numel() == 0:
        return gate.new_zeros(gate.shape, dtype=out_dtype), empty_inverse_rms(gate, keep_inverse_rms).T
    group = rows_of_groups(offsets, end)[0]
    out, inverse_rms = cpu.forward(
        as_rows(gate)[:end],
        as_rows(up)[:end],
        weight[group],
        bias[group],
        inverse_rms=None,
        keep_inverse_rms=keep_inverse_rms,
        eps=eps,
        hidden_clamp=hidden_clamp,
        out_dtype=out_dtype,
    )
    kept = empty_inverse_rms(gate, False) if inverse_rms is None else _pad(inverse_rms.T, rows)
    return _pad(out, rows), kept


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    inverse_rms: Tensor,
    hidden_clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up, weight and bias."""
    rows, end = len(gate), int(offsets[-1])
    if end == 0 or gate.numel() == 0:
        return gate.new_zeros(gate.shape), up.new_zeros(up.shape), torch.zeros_like(weight), torch.zeros_like(bias)
    group = rows_of_groups(offsets, end)[0]
    dgate, dup, sums = cpu.backward(
        as_rows(grad)[:end],
        as_rows(gate)[:end],
        as_rows(up)[:end],
        weight[group],
        bias[group],
        inverse_rms=inverse_rms[:end].T,
        mean_products=None,
        hidden_clamp=hidden_clamp,
    )
    assert dup is not None
    assert sums is not None
    dw, db = sums.new_zeros(len(weight), 4).index_add_(0, group, sums.T).split((3, 1), dim=-1)
    return _pad(dgate, rows), _pad(dup, rows), dw.to(weight.dtype, copy=True), db.to(bias.dtype, copy=True)


_operator = torch.library.custom_op("motif::grouped_poly_norm", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("motif::grouped_poly_norm_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_operator.register_fake
def _(gate: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, out_dtype, keep_inverse_rms = arguments
    kept = empty_inverse_rms(gate, keep_inverse_rms)
    return gate.new_empty(gate.shape, dtype=out_dtype), kept.T if keep_inverse_rms else kept


@_backward_operator.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (gate, up, weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.hidden_clamp, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *_run_backward(grad, *ctx.saved_tensors, ctx.hidden_clamp), None, None, None, None, None


grouped_poly_norm = differentiable(_operator, _forward, _save, _differentiate)
