"""PolyNorm, alone or times the other branch, on whole rows and sharded ones."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from motif_kernels.impl.constants import POWER_SCALE
from motif_kernels.ops import implementation
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import compute_dtype

FAMILY = "poly_norm"


def as_rows(x: Tensor) -> Tensor:
    """X (..., N) as (R, N) with contiguous columns, without a copy where its strides allow."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _optional_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_rows(x)


def _like(gradient: Tensor | None, x: Tensor | None, other: Tensor) -> Tensor:
    """A gradient in its tensor's shape; an absent one is empty, for None can't be returned."""
    if gradient is None or x is None:
        return other.new_empty(0)
    return gradient.view(x.shape)


def _forward(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_dtype: torch.dtype,
    keep_inverse_rms: bool,
) -> tuple[Tensor, Tensor]:
    """PolyNorm of x (..., N), times up if given, with weight (3,) and bias (1,).

    For the backward pass, the inverse root mean squares (3, R) of the three powers; without
    ``keep_inverse_rms`` they are empty, and there is no backward pass.
    """
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=out_dtype, device=x.device), empty_inverse_rms(x, keep_inverse_rms)
    with torch.cuda.device_of(x):
        out, inverse_rms = implementation(FAMILY, x.device).forward(
            as_rows(x),
            _optional_rows(up),
            weight,
            bias,
            inverse_rms=None,
            keep_inverse_rms=keep_inverse_rms,
            eps=eps,
            hidden_clamp=hidden_clamp,
            out_dtype=out_dtype,
        )
    return out.view(x.shape), inverse_rms if inverse_rms is not None else empty_inverse_rms(x, keep_inverse_rms)


def empty_inverse_rms(x: Tensor, kept: bool) -> Tensor:
    """Room for the inverse root mean squares of x's rows, (3, R); empty unless they are kept."""
    return x.new_empty((3, x.numel() // x.shape[-1]) if kept else 0, dtype=compute_dtype(x))


_operator = torch.library.custom_op("motif::poly_norm", _forward, mutates_args=())


@_operator.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, out_dtype, keep_inverse_rms = arguments
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), empty_inverse_rms(x, keep_inverse_rms)


def _backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    inverse_rms: Tensor,
    hidden_clamp: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, up (empty if there is none), weight and bias."""
    if x.numel() == 0:
        return torch.empty_like(x), _like(up, up, x).clone(), torch.zeros_like(weight), torch.zeros_like(bias)
    with torch.cuda.device_of(x):
        dx, dup, sums = implementation(FAMILY, x.device).backward(
            as_rows(grad),
            as_rows(x),
            _optional_rows(up),
            weight,
            bias,
            inverse_rms=inverse_rms,
            mean_products=None,
            hidden_clamp=hidden_clamp,
        )
        total = sums.sum(dim=1)
    return (
        dx.view(x.shape),
        _like(dup, up, x),
        total[:3].to(weight.dtype, copy=True),
        total[3:].to(bias.dtype, copy=True),
    )


_backward_operator = torch.library.custom_op("motif::poly_norm_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


def _fake_gradients(
    grad: Tensor, x: Tensor, up: Tensor | None, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dup = x.new_empty(0) if up is None else up.new_empty(up.shape)
    return x.new_empty(x.shape), dup, weight.new_empty(3), bias.new_empty(1)


_backward_operator.register_fake(_fake_gradients)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, up, weight, bias, _, ctx.hidden_clamp, *_ = inputs
    ctx.save_for_backward(x, up, weight, bias, output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, up, weight, bias, inverse_rms = ctx.saved_tensors
    dx, dup, dw, db = _run_backward(grad, x, up, weight, bias, inverse_rms, ctx.hidden_clamp)
    return dx, (dup if up is not None else None), dw, db, None, None, None, None


poly_norm = differentiable(_operator, _forward, _save, _differentiate)


# Rows sharded over a process group. Each way, every rank adds up its own columns, the sums are
# added over the ranks in one all-reduce, and the rank finishes its columns. The count of columns
# travels along, so that shards may differ.


def _all_reduce(sums: Tensor, extra: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    """Both tensors summed over the group, in one message."""
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    message = torch.cat((sums.flatten(), extra.flatten()))
    dist.all_reduce(message, group=group)
    return message[: sums.numel()].view(sums.shape), message[sums.numel() :]


def forward_sharded(
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    hidden_clamp: float | None,
    out_dtype: torch.dtype,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`poly_norm` of rows whose columns are spread over a process group.

    Returns:
        This rank's columns of the result, and for the backward pass the inverse root mean squares
        (3, R) and the number of columns on all ranks (1,).
    """
    rows = as_rows(x)
    run = implementation(FAMILY, x.device)
    with torch.cuda.device_of(x):
        local = run.power_sums(rows, hidden_clamp=hidden_clamp)
        sums, columns = _all_reduce(local, local.new_full((1,), rows.shape[1]), group_name)
        # Numbers, not a tensor made of them: that would be copied from the host, which waits.
        means = (total / columns + eps * POWER_SCALE**power for total, power in zip(sums, (6, 4, 2), strict=True))
        inverse_rms = torch.stack(tuple(means)).rsqrt_()
        out, _ = run.forward(
            rows,
            _optional_rows(up),
            weight,
            bias,
            inverse_rms=inverse_rms,
            keep_inverse_rms=False,
            eps=eps,
            hidden_clamp=hidden_clamp,
            out_dtype=out_dtype,
        )
    return out.view(x.shape), inverse_rms, columns.clone()


poly_norm_sharded = torch.library.custom_op("motif::poly_norm_sharded", forward_sharded, mutates_args=())


@poly_norm_sharded.register_fake
def _(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, out_dtype, _ = arguments
    inverse_rms = empty_inverse_rms(x, True)
    return torch.empty(x.shape, dtype=out_dtype, device=x.device), inverse_rms, inverse_rms.new_empty(1)


def backward_sharded(
    grad: Tensor,
    x: Tensor,
    up: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    inverse_rms: Tensor,
    columns: Tensor,
    hidden_clamp: float | None,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of this rank's columns of x and up, and the full ones of weight and bias."""
    rows, grads, ups = as_rows(x), as_rows(grad), _optional_rows(up)
    run = implementation(FAMILY, x.device)
    with torch.cuda.device_of(x):
        local = run.product_sums(grads, rows, ups, hidden_clamp=hidden_clamp)
        products, db = _all_reduce(local[:3] * inverse_rms, local[3].sum(), group_name)
        dx, dup, _ = run.backward(
            grads,
            rows,
            ups,
            weight,
            bias,
            inverse_rms=inverse_rms,
            mean_products=products / columns,
            hidden_clamp=hidden_clamp,
        )
        dw = products.sum(dim=1)
    return dx.view(x.shape), _like(dup, up, x), dw.to(weight.dtype, copy=True), db.to(bias.dtype, copy=True)


_poly_norm_sharded_backward = torch.library.custom_op(
    "motif::poly_norm_sharded_backward", backward_sharded, mutates_args=()
)
_poly_norm_sharded_backward.register_fake(_fake_gradients)


def _save_sharded(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, up, weight, bias, _, ctx.hidden_clamp, _, ctx.group_name = inputs
    _, inverse_rms, columns = output
    ctx.mark_non_differentiable(inverse_rms, columns)
    ctx.save_for_backward(x, up, weight, bias, inverse_rms, columns)


def _differentiate_sharded(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, up, weight, bias, inverse_rms, columns = ctx.saved_tensors
    dx, dup, dw, db = _poly_norm_sharded_backward(
        grad, x, up, weight, bias, inverse_rms, columns, ctx.hidden_clamp, ctx.group_name
    )
    return dx, (dup if up is not None else None), dw, db, None, None, None, None


poly_norm_sharded.register_autograd(_differentiate_sharded, setup_context=_save_sharded)
