"""Hyper-connections: what a sublayer reads of the streams, the maps, and the streams' update."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import compute_dtype

FAMILY = "hyper_connections"


def _run(x: Tensor) -> Any:
    return implementation(FAMILY, x.device)


def _rows(x: Tensor, dimensions: int) -> Tensor:
    """(..., *last) as (R, *last) with contiguous columns, without a copy where strides allow."""
    last = x.shape[x.ndim - dimensions :]
    x = x.reshape(x.shape[: x.ndim - dimensions].numel(), *last)
    return x if x.stride(-1) == 1 or last[-1] == 1 else x.contiguous()


def _optional_rows(x: Tensor | None, dimensions: int) -> Tensor | None:
    return None if x is None else _rows(x, dimensions)


# Reading.


def _read(streams: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (..., E), products (..., C) and inverse root mean squares (...) of streams
    (..., n, E), with weight (C, n E) and bias (n,).
    """
    leading = streams.shape[:-2]
    with torch.cuda.device_of(streams):
        read, products, inverse_rms = _run(streams).read_forward(_rows(streams, 2), weight, bias, eps=eps)
    return read.view(*leading, streams.shape[-1]), products.view(*leading, len(weight)), inverse_rms.view(leading)


def _fake_read(streams: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    leading, dtype = streams.shape[:-2], compute_dtype(streams)
    return (
        streams.new_empty(*leading, streams.shape[-1]),
        streams.new_empty(*leading, weight.shape[0], dtype=dtype),
        streams.new_empty(leading, dtype=dtype),
    )


def _read_backward(
    grad: Tensor | None,
    grad_products: Tensor | None,
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    products: Tensor,
    inverse_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of streams, weight and bias; at least one of the incoming two is there."""
    with torch.cuda.device_of(streams):
        dstreams, dweight, dbias = _run(streams).read_backward(
            _optional_rows(grad, 1),
            _optional_rows(grad_products, 1),
            _rows(streams, 2),
            weight,
            bias,
            _rows(products, 1),
            inverse_rms.reshape(-1),
        )
    return dstreams.view(streams.shape), dweight.to(weight.dtype), dbias.to(bias.dtype)


def _fake_read_backward(
    grad: Tensor | None, grad_products: Tensor | None, streams: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return streams.new_empty(streams.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_read(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _differentiate_read(ctx: Any, grad: Tensor | None, grad_products: Tensor | None, _: None) -> tuple[Any, ...]:
    return *_run_read_backward(grad, grad_products, *ctx.saved_tensors), None


# Maps.


def _maps(products: Tensor, bias: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Gates (..., n) and matrices (..., n, n) of products (..., n + n + n n), the first n of which
    are not theirs, and bias (n + n n,).
    """
    leading, n = products.shape[:-1], products.shape[-1] - bias.shape[0]
    with torch.cuda.device_of(products):
        post, mix = _run(products).maps_forward(_rows(products, 1), bias, iterations=iterations)
    return post.view(*leading, n), mix.view(*leading, n, n)


def _fake_maps(products: Tensor, bias: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    leading, n = products.shape[:-1], products.shape[-1] - bias.shape[0]
    return products.new_empty(*leading, n), products.new_empty(*leading, n, n)


def _maps_backward(
    grad_post: Tensor | None,
    grad_mix: Tensor | None,
    products: Tensor,
    bias: Tensor,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of products and bias; at least one of the incoming two is there."""
    with torch.cuda.device_of(products):
        dproducts, dbias = _run(products).maps_backward(
            _optional_rows(grad_post, 1),
            _optional_rows(grad_mix, 2),
            _rows(products, 1),
            bias,
            iterations=iterations,
        )
    return dproducts.view(products.shape), dbias.to(bias.dtype)


def _fake_maps_backward(
    grad_post: Tensor | None, grad_mix: Tensor | None, products: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return products.new_empty(products.shape), bias.new_empty(bias.shape)


def _save_maps(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    products, bias, ctx.iterations = inputs
    ctx.save_for_backward(products, bias)


def _differentiate_maps(ctx: Any, grad_post: Tensor | None, grad_mix: Tensor | None) -> tuple[Any, ...]:
    return *_run_maps_backward(grad_post, grad_mix, *ctx.saved_tensors, ctx.iterations), None


# The update.


def _update(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """``mix X + post out`` for streams X (..., n, E), out (..., E), post (..., n) and mix
    (..., n, n).
    """
    with torch.cuda.device_of(streams):
        updated = _run(streams).update_forward(_rows(streams, 2), _rows(out, 1), _rows(post, 1), _rows(mix, 2))
    # Not a view of it: FSDP2 warns of layers that return views.
    return torch.ops.aten._unsafe_view(updated, streams.shape)  # type: ignore[no-any-return]


def _fake_update(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    return streams.new_empty(streams.shape)


def _update_backward(
    grad: Tensor, streams: Tensor, out: Tensor, post: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, out, post and mix."""
    with torch.cuda.device_of(streams):
        dstreams, dout, dpost, dmix = _run(streams).update_backward(
            _rows(grad, 2), _rows(streams, 2), _rows(out, 1), _rows(post, 1), _rows(mix, 2)
        )
    return (
        dstreams.view(streams.shape),
        dout.view(out.shape),
        dpost.view(post.shape).to(post.dtype),
        dmix.view(mix.shape).to(mix.dtype),
    )


def _fake_update_backward(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    streams, out, post, mix = (t.new_empty(t.shape) for t in inputs)
    return streams, out, post, mix


def _save_update(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_update(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return tuple(_run_update_backward(grad, *ctx.saved_tensors))


def _operator(name: str, run: Any, fake: Any) -> Any:
    operator = torch.library.custom_op(f"motif::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


_run_read_backward = with_shortcut(
    _operator("read_streams_backward", _read_backward, _fake_read_backward), _read_backward
)
_run_maps_backward = with_shortcut(
    _operator("stream_maps_backward", _maps_backward, _fake_maps_backward), _maps_backward
)
_run_update_backward = with_shortcut(
    _operator("update_streams_backward", _update_backward, _fake_update_backward), _update_backward
)
read_streams = differentiable(
    _operator("read_streams", _read, _fake_read), _read, _save_read, _differentiate_read, outputs=2
)
stream_maps = differentiable(
    _operator("stream_maps", _maps, _fake_maps), _maps, _save_maps, _differentiate_maps, outputs=2
)
update_streams = differentiable(
    _operator("update_streams", _update, _fake_update), _update, _save_update, _differentiate_update
)
