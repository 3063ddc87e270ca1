"""Hyper-connections on the CPU: a block of tokens at a time, whose wide copies stay in cache.

The update of large streams in bfloat16 is one loop where there is a compiler. Else its sums are
products of small matrices: ``[H | post] [X; o]`` for each token, so that one product gives both
terms, and each of its two derivatives both gradients.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.constants import GATE_BOUND, LEAST_SUM, MIX_BOUND
from motif_kernels.impl.cpu.row_formulas import RowFormula, cpu_kernels, is_large
from motif_kernels.reference import compute_dtype, stream_gates

# Elements of the streams, and of the mixing matrices, in a block, for each thread: a mebibyte of
# float32 is half of the second-level cache.
_BLOCK_ELEMENTS = 1 << 18


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _without_autocast() -> Any:
    """Products here are of the compute dtype."""
    return torch.autocast("cpu", enabled=False)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Batches of matrices, multiplied in their own dtype into one that may be narrower."""
    if out.dtype == a.dtype:
        torch.bmm(a, b, out=out)
    else:
        out.copy_(torch.bmm(a, b))


def _gate_gradient(grad: Tensor, logits: Tensor, gate: Tensor) -> Tensor:
    """From a gate's gradient to its logits': 0 where they were clamped."""
    return torch.where(logits.abs() <= GATE_BOUND, grad * gate * (1 - gate), 0.0)


def read_forward(streams: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What the sublayer reads of streams (R, n, E), their products with weight (C, n E), and the
    inverse root mean squares: (R, E), (R, C), (R,).
    """
    rows, n, width = streams.shape
    dtype = compute_dtype(streams)
    weight, bias = weight.to(dtype), bias.to(dtype)
    read = streams.new_empty(rows, width)
    products = streams.new_empty(rows, len(weight), dtype=dtype)
    inverse_rms = streams.new_empty(rows, dtype=dtype)
    with _without_autocast():
        for block in _blocks(rows, n * width):
            x = streams[block].to(dtype)
            flat = x.reshape(len(x), -1)
            r = torch.linalg.vector_norm(flat, dim=1).square_().div_(n * width).add_(eps).rsqrt_()
            p = torch.mm(flat, weight.mT).mul_(r[:, None])
            _multiply(stream_gates(p[:, :n] + bias)[:, None], x, read[block][:, None])
            products[block], inverse_rms[block] = p, r
    return read, products, inverse_rms


def read_backward(
    grad: Tensor | None,
    grad_products: Tensor | None,
    streams: Tensor,
    weight: Tensor,
    bias: Tensor,
    products: Tensor,
    inverse_rms: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the streams, weight and bias, the last two in the compute dtype."""
    rows, n, width = streams.shape
    dtype = compute_dtype(streams)
    weight, bias = weight.to(dtype), bias.to(dtype)
    dstreams, in_place = streams.new_empty(streams.shape), streams.dtype == dtype
    dweight, dbias = torch.zeros(weight.shape, dtype=dtype), torch.zeros(bias.shape, dtype=dtype)
    with _without_autocast():
        for block in _blocks(rows, n * width):
            x, p, r = streams[block].to(dtype), products[block], inverse_rms[block, None]
            flat = x.reshape(len(x), -1)
            dp = torch.zeros_like(p) if grad_products is None else grad_products[block].clone()
            if grad is not None:
                g, logits = grad[block].to(dtype), p[:, :n] + bias
                pre = stream_gates(logits)
                dlogits = _gate_gradient(torch.bmm(x, g[..., None])[..., 0], logits, pre)
                dp[:, :n] += dlogits
                dbias += dlogits.sum(0)
            dq = dp * r
            dx = torch.mm(dq, weight, out=dstreams[block].view(len(x), -1)) if in_place else torch.mm(dq, weight)
            dx.addcmul_(flat, (dq * p).sum(1, keepdim=True).mul_(r), value=-1 / (n * width))
            if grad is not None:
                dx.view(x.shape).addcmul_(pre[..., None], g[:, None])
            if not in_place:
                dstreams[block] = dx.view(x.shape)
            dweight.addmm_(dq.mT, flat)
    return dstreams, dweight, dbias


def _divide(matrix: Tensor, iterations: int) -> tuple[Tensor, list[Tensor]]:
    """Sinkhorn's iterations on matrices (n, n, R), in place, and what was divided by: (n, 1, R) for
    rows and (1, n, R) for columns, in turn.
    """
    divisors = []
    for step in range(2 * iterations):
        sums = matrix.sum(dim=1 - step % 2, keepdim=True).clamp_(min=LEAST_SUM)
        matrix.div_(sums)
        divisors.append(sums)
    return matrix, divisors


def _mix_logits(products: Tensor, bias: Tensor, n: int) -> Tensor:
    """(n, n, R): with the n x n in front, each operator runs through long rows."""
    return (products[:, 2 * n :] + bias[n:]).mT.contiguous().view(n, n, -1)


def maps_forward(products: Tensor, bias: Tensor, *, iterations: int) -> tuple[Tensor, Tensor]:
    """Gates (R, n) and doubly stochastic matrices (R, n, n) of products (R, n + n + n n)."""
    n = _streams_of(bias)
    bias = bias.to(products.dtype)
    post = stream_gates(products[:, n : 2 * n] + bias[:n])
    mix = products.new_empty(len(products), n, n)
    for block in _blocks(len(products), n * n):
        logits = _mix_logits(products[block], bias, n)
        matrix, _ = _divide(logits.clamp_(-MIX_BOUND, MIX_BOUND).exp_(), iterations)
        mix[block] = matrix.movedim(-1, 0)
    return post, mix


def maps_backward(
    grad_post: Tensor | None,
    grad_mix: Tensor | None,
    products: Tensor,
    bias: Tensor,
    *,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of products and, in their dtype, of bias.

    An iteration divides x by its sums s: y = x / s. In terms of logarithms the gradient loses y
    times its own sum, unless s was clamped, which makes it a constant; and x = y s again. So the
    divisors, n numbers each, are all that is kept of the iterations.
    """
    n = _streams_of(bias)
    bias = bias.to(products.dtype)
    dproducts = torch.zeros_like(products)
    if grad_post is not None:
        logits = products[:, n : 2 * n] + bias[:n]
        dproducts[:, n : 2 * n] = _gate_gradient(grad_post, logits, stream_gates(logits))
    if grad_mix is not None:
        for block in _blocks(len(products), n * n):
            logits = _mix_logits(products[block], bias, n)
            y, divisors = _divide(logits.clamp(-MIX_BOUND, MIX_BOUND).exp_(), iterations)
            g = y * grad_mix[block].movedim(0, -1)
            for step in reversed(range(2 * iterations)):
                s = divisors.pop()
                g -= y * g.sum(dim=1 - step % 2, keepdim=True).masked_fill_(s <= LEAST_SUM, 0.0)
                y *= s
            g.masked_fill_(logits.abs() > MIX_BOUND, 0.0)
            dproducts[block, 2 * n :] = g.flatten(0, 1).mT
    return dproducts, dproducts[:, n:].sum(0)


def _streams_of(bias: Tensor) -> int:
    """N, of the n + n n numbers of a bias."""
    return int((len(bias) + 0.25) ** 0.5)


def _with_output(streams: Tensor, out: Tensor, dtype: torch.dtype) -> Tensor:
    """[X; o]: (R, n + 1, E)."""
    joined = torch.empty(len(streams), streams.shape[1] + 1, streams.shape[2], dtype=dtype)
    joined[:, :-1], joined[:, -1] = streams, out
    return joined


def _weighted(weights: Tensor, tensors: list[Tensor]) -> Tensor:
    """Sum of tensors (R, E), each times its column of weights."""
    return sum((weights[:, i, None] * t for i, t in enumerate(tensors)), start=torch.zeros_like(tensors[0]))


@RowFormula
def _update(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> tuple[Tensor]:
    dtype = compute_dtype(streams)
    weights = torch.cat((mix, post[..., None]), dim=-1).to(dtype)
    added = [*streams.to(dtype).unbind(1), out.to(dtype)]
    return (torch.stack([_weighted(weights[:, i], added).to(streams.dtype) for i in range(streams.shape[1])], 1),)


@RowFormula
def _update_gradients(
    grad: Tensor, streams: Tensor, out: Tensor, post: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(streams)
    g, added = grad.to(dtype).unbind(1), [*streams.to(dtype).unbind(1), out.to(dtype)]
    columns = [_weighted(mix[..., j].to(dtype), [*g]).to(streams.dtype) for j in range(streams.shape[1])]
    dweights = torch.stack([torch.stack([(each * x).sum(-1) for x in added], 1) for each in g], 1)
    dout = _weighted(post.to(dtype), [*g]).to(out.dtype)
    return torch.stack(columns, 1), dout, dweights[..., -1].contiguous(), dweights[..., :-1].contiguous()


def _fused(streams: Tensor) -> bool:
    """Where products would need wider copies; in float32 they are nearly as fast."""
    return streams.dtype.itemsize < 4 and is_large(streams) and cpu_kernels() == "inductor"


def update_forward(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """``H X + post o`` for streams (R, n, E) and out (R, E), rounded once."""
    if _fused(streams):
        updated: Tensor = _update(streams, out, post, mix)[0]
        return updated
    dtype = compute_dtype(streams)
    weights = torch.cat((mix, post[..., None]), dim=-1).to(dtype)
    updated = streams.new_empty(streams.shape)
    with _without_autocast():
        for block in _blocks(len(streams), streams.shape[1] * streams.shape[2]):
            _multiply(weights[block], _with_output(streams[block], out[block], dtype), updated[block])
    return updated


def update_backward(
    grad: Tensor, streams: Tensor, out: Tensor, post: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of streams, out, post and mix."""
    if _fused(streams):
        gradients: tuple[Tensor, Tensor, Tensor, Tensor] = _update_gradients(grad, streams, out, post, mix)
        return gradients
    dtype = compute_dtype(streams)
    rows, n, _ = streams.shape
    dstreams, dout = streams.new_empty(streams.shape), out.new_empty(out.shape)
    dweights = streams.new_empty(rows, n, n + 1, dtype=dtype)
    with _without_autocast():
        for block in _blocks(len(streams), streams.shape[1] * streams.shape[2]):
            g = grad[block].to(dtype)
            torch.bmm(g, _with_output(streams[block], out[block], dtype).mT, out=dweights[block])
            _multiply(mix[block].to(dtype).mT, g, dstreams[block])
            _multiply(post[block].to(dtype)[:, None], g, dout[block][:, None])
    return dstreams, dout, dweights[..., -1].contiguous(), dweights[..., :-1].contiguous()
