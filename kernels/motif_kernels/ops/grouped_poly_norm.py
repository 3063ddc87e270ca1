"""PolyNorm times the other branch, of rows that are sorted by expert.

``offsets`` (E,) int32 are where each expert's rows end; those of the next begin there. Rows past
the last are of no expert: what they hold is not used, and what comes out of them is 0.

Gate and up may be one tensor (T, 2 N), gate before up: then so are their gradients, and none is
copied to join the other.
"""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.ops.poly_norm import FAMILY, as_rows, empty_inverse_rms
from motif_kernels.ops.shortcut import differentiable, with_shortcut


def _branches(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gate and up (T, N) with contiguous columns, cut apart where they are one tensor."""
    gate, up = gate.chunk(2, dim=-1) if up is None else (gate, up)
    return as_rows(gate), as_rows(up)


def _forward(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None,
    out_dtype: torch.dtype,
    keep_inverse_rms: bool,
) -> tuple[Tensor, Tensor]:
    """PolyNorm of gate (T, N) times up, with weight (E, 3) and bias (E, 1), within out_clamp.

    For the backward pass, the inverse root mean squares (3, T) of the three powers; without
    ``keep_inverse_rms`` they are empty, and there is no backward pass.
    """
    x, up = _branches(gate, up)
    kept = empty_inverse_rms(x, keep_inverse_rms)
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=out_dtype), kept
    with torch.cuda.device_of(x):
        out, inverse_rms = implementation(FAMILY, x.device).forward(
            x,
            up,
            weight,
            bias,
            offsets,
            inverse_rms=None,
            keep_inverse_rms=keep_inverse_rms,
            eps=eps,
            hidden_clamp=hidden_clamp,
            out_clamp=out_clamp,
            out_dtype=out_dtype,
        )
    return out, kept if inverse_rms is None else inverse_rms


def _backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    inverse_rms: Tensor,
    hidden_clamp: float | None,
    out_clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gate, up (empty if it is in gate), weight and bias."""
    joined = up is None
    x, up = _branches(gate, up)
    if x.numel() == 0:
        return torch.empty_like(gate), torch.empty_like(up), torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.cuda.device_of(x):
        dgate, dup, sums = implementation(FAMILY, x.device).backward(
            as_rows(grad),
            x,
            up,
            weight,
            bias,
            offsets,
            inverse_rms=inverse_rms,
            mean_products=None,
            hidden_clamp=hidden_clamp,
            out_clamp=out_clamp,
            joined=joined,
        )
        dw, db = implementation("group_sums", x.device).group_sums(sums, offsets).split((3, 1), dim=-1)
    dup = dgate.new_empty(0) if dup is None else dup
    return dgate, dup, dw.to(weight.dtype, copy=True), db.to(bias.dtype, copy=True)


_operator = torch.library.custom_op("motif::grouped_poly_norm", _forward, mutates_args=())
_backward_operator = torch.library.custom_op("motif::grouped_poly_norm_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_operator.register_fake
def _(gate: Tensor, up: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, out_dtype, keep_inverse_rms = arguments
    x = gate.chunk(2, dim=-1)[0] if up is None else gate
    return x.new_empty(x.shape, dtype=out_dtype), empty_inverse_rms(x, keep_inverse_rms)


@_backward_operator.register_fake
def _(
    grad: Tensor, gate: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup = gate.new_empty(0 if up is None else up.shape)
    return gate.new_empty(gate.shape), dup, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.hidden_clamp, ctx.out_clamp, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: of a layer that is recomputed there is no second time
    dgate, dup, dw, db = _run_backward(grad, *saved, ctx.hidden_clamp, ctx.out_clamp)
    return dgate, (None if saved[1] is None else dup), dw, db, *(None,) * 6


grouped_poly_norm = differentiable(_operator, _forward, _save, _differentiate)


# In MXFP8, for the product that follows.


@torch.library.custom_op("motif::grouped_poly_norm_mxfp8", mutates_args=())
def grouped_poly_norm_mxfp8(
    gate: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    offsets: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_clamp: float | None,
) -> tuple[Tensor, Tensor]:
    """PolyNorm of gate (T, N) times up as float8_e4m3fn (T, N), and scales (T, N / 32)."""
    x, up = _branches(gate, up)
    with torch.cuda.device_of(x):
        values, scales = implementation(FAMILY, x.device).forward_mxfp8(
            x, up, weight, bias, offsets, eps=eps, hidden_clamp=hidden_clamp, out_clamp=out_clamp
        )
    return values, scales


@grouped_poly_norm_mxfp8.register_fake
def _(gate: Tensor, up: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    rows, columns = gate.shape[0], gate.shape[1] // (2 if up is None else 1)
    scales = gate.new_empty(rows, columns // 32, dtype=torch.float8_e8m0fnu)
    return gate.new_empty(rows, columns, dtype=torch.float8_e4m3fn), scales
