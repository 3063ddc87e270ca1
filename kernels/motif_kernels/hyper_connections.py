"""Manifold-constrained hyper-connections (mHC, arXiv 2512.24880): several residual streams, of
which a sublayer reads one sum, and which doubly stochastic matrices mix.

    read, products = read_streams(streams, weight, bias[:n])
    post, mix = stream_maps(products, bias[n:])
    streams = update_streams(streams, sublayer(read), post, mix)

All arithmetic is in float32 (float64 for float64 streams), also under autocast. For the backward
pass the arguments are kept as they are, and a hundred bytes a token.
"""

from torch import Tensor

from motif_kernels import ops, reference
from motif_kernels.checks import check_devices
from motif_kernels.dispatch import as_given
from motif_kernels.ops import hyper_connections as operator


def _check_streams(function: str, streams: Tensor) -> None:
    if not streams.is_floating_point():
        raise TypeError(f"{function}: streams has dtype {streams.dtype}; it must be a floating-point tensor")
    if streams.ndim < 2 or 0 in streams.shape[-2:]:
        raise ValueError(
            f"{function}: streams has shape {tuple(streams.shape)}; it must be (..., streams, width), both at least 1"
        )


def _check_shape(function: str, name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}; it must be {shape}, {meaning}")


def read_streams(streams: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The weighted sum of streams that a sublayer reads, and what all gates are made of.

    ``products = RMSNorm(vec(X)) weight^T`` and ``read = sum_i sigmoid(clamp(products_i + bias_i,
    -10, 10)) X_i`` for i below n. The norm's own weight and the factors of the logits are to be
    multiplied into ``weight`` beforehand, a small matrix.

    Args:
        streams: X (..., n, E).
        weight: (C, n E), C at least n; in :func:`stream_maps`'s order, n + n + n n.
        bias: (n,).
        eps: added to the mean square of a token's n E numbers.

    Returns:
        ``read`` (..., E) of the streams' dtype, and ``products`` (..., C) in float32 (float64).

    Raises:
        TypeError: streams is not a floating-point tensor.
        ValueError: a tensor has another shape or device.
    """
    check_devices(streams=streams, weight=weight, bias=bias)
    _check_streams("read_streams", streams)
    n, width = streams.shape[-2:]
    if weight.ndim != 2 or weight.shape[1] != n * width or weight.shape[0] < n:
        raise ValueError(
            f"read_streams: weight has shape {tuple(weight.shape)}; it must be (products, {n * width}), a column for "
            f"each number of {n} streams of {width}, with {n} products or more"
        )
    _check_shape("read_streams", "bias", bias, (n,), "one for each stream")
    if ops.has_implementation(streams.device):
        read, products, _ = operator.read_streams(streams, weight, bias, eps)
        return read, products
    with as_given(streams.device):
        return reference.read_streams(streams, weight, bias, eps=eps)


def stream_maps(products: Tensor, bias: Tensor, *, iterations: int = 20) -> tuple[Tensor, Tensor]:
    """Gates for a sublayer's output, and matrices that mix the streams.

    Products are those of :func:`read_streams`: n that are not used here, n and n x n by rows.
    ``post = sigmoid(clamp(., -10, 10))``, and ``mix`` is ``exp(clamp(., -20, 20))``
    after so many iterations of Sinkhorn's: rows are divided by their sums, and then columns; a sum
    below 1e-8 counts as that.

    Args:
        products: (..., n + n + n n), float32 or float64.
        bias: (n + n n,), added first.
        iterations: 0 or more.

    Returns:
        ``post`` (..., n) and ``mix`` (..., n, n), in products' dtype.

    Raises:
        TypeError: products is neither float32 nor float64.
        ValueError: a shape, device or number of iterations that does not fit.
    """
    check_devices(products=products, bias=bias)
    if products.dtype != reference.compute_dtype(products):
        raise TypeError(f"stream_maps: products has dtype {products.dtype}; it must be float32 or float64")
    if products.ndim == 0 or bias.ndim != 1:
        raise ValueError(
            f"stream_maps: products has shape {tuple(products.shape)} and bias {tuple(bias.shape)}; they must be "
            "(..., n + n + n n) and (n + n n,)"
        )
    n = products.shape[-1] - bias.shape[0]
    if n < 1 or bias.shape[0] != n + n * n:
        raise ValueError(
            f"stream_maps: there are {products.shape[-1]} products and {bias.shape[0]} biases; for n streams there "
            "must be n + n + n n and n + n n"
        )
    if iterations < 0:
        raise ValueError(f"stream_maps: iterations is {iterations}; it must be 0 or more")
    if ops.has_implementation(products.device):
        return operator.stream_maps(products, bias, iterations)  # type: ignore[no-any-return]
    return reference.stream_maps(products, bias, iterations=iterations)


def update_streams(streams: Tensor, out: Tensor, post: Tensor, mix: Tensor) -> Tensor:
    """``X'_i = sum_j mix_ij X_j + post_i out``, rounded once.

    Args:
        streams: X (..., n, E).
        out: (..., E), of any floating-point dtype.
        post: (..., n).
        mix: (..., n, n).

    Returns:
        Tensor of the streams' shape and dtype.

    Raises:
        TypeError: streams or out is not a floating-point tensor.
        ValueError: a tensor has another shape or device.
    """
    check_devices(streams=streams, out=out, post=post, mix=mix)
    _check_streams("update_streams", streams)
    if not out.is_floating_point():
        raise TypeError(f"update_streams: out has dtype {out.dtype}; it must be a floating-point tensor")
    *leading, n, width = streams.shape
    _check_shape("update_streams", "out", out, (*leading, width), "a row for each token")
    _check_shape("update_streams", "post", post, (*leading, n), "a number for each stream")
    _check_shape("update_streams", "mix", mix, (*leading, n, n), "a matrix for each token")
    if ops.has_implementation(streams.device):
        return operator.update_streams(streams, out, post, mix)  # type: ignore[no-any-return]
    return reference.update_streams(streams, out, post, mix)
