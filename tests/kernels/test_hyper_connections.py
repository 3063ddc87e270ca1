"""Hyper-connections' kernels: a loop in numpy, the error rule, clamps, views, what is kept."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from helpers.numerics import assert_error_rule, leaves
from motif_kernels import read_streams, reference, stream_maps, update_streams

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def products_of(n):
    return n * (n + 2)


def to_read(rows, n, width, dtype=torch.float32, device="cpu"):
    streams = torch.randn(*rows, n, width).to(device, dtype)
    weight = torch.randn(products_of(n), n * width) / math.sqrt(n * width)
    return streams, weight.to(device), torch.randn(n).to(device)


def to_map(rows, n, scale=2.0, device="cpu"):
    return scale * torch.randn(*rows, products_of(n), device=device), torch.randn(n + n * n, device=device)


def to_update(rows, n, width, dtype=torch.float32, device="cpu"):
    streams, out = torch.randn(*rows, n, width), torch.randn(*rows, width)
    maps = torch.rand(*rows, n), torch.rand(*rows, n, n)
    return *(t.to(device, dtype) for t in (streams, out)), *(t.to(device) for t in maps)


def run(function, inputs, grads):
    """Outputs, and gradients of all inputs."""
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]
    return *outs, *torch.autograd.grad(outs, inputs, grads)


def assert_rule(ours, plain, inputs, grads):
    """The error rule for all outputs and gradients."""
    exact = run(plain, leaves(*inputs, dtype=torch.float64), grads)
    for o, p, e in zip(run(ours, leaves(*inputs), grads), run(plain, leaves(*inputs), grads), exact, strict=True):
        # Sums over tokens and columns may cancel: their rounding floor is that of a random walk.
        steps = math.prod(inputs[0].shape[:-2]) + inputs[0].shape[-1] if o.dtype == torch.float32 else 1
        floor = torch.finfo(o.dtype).eps * 2 * e.abs().max().clamp(min=1).item() * steps**0.5
        assert_error_rule(o, p, e, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "width"), [((5,), 4, 40), ((2, 9), 3, 33), ((3,), 2, 1), ((1,), 5, 300)])
def test_reading(dtype, rows, n, width, path):
    path.require(dtype)
    inputs = to_read(rows, n, width, dtype, path.device)
    grads = torch.randn(*rows, width).to(path.device, dtype), torch.randn(*rows, products_of(n), device=path.device)
    assert_rule(read_streams, reference.read_streams, inputs, grads)


@pytest.mark.parametrize(("n", "iterations"), [(4, 20), (3, 20), (2, 3), (5, 1), (4, 0)])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # a large one reaches the clamps
def test_maps(n, iterations, scale, path):
    rows = (4, 5)
    inputs = to_map(rows, n, scale, path.device)
    grads = torch.randn(*rows, n, device=path.device), torch.randn(*rows, n, n, device=path.device)
    options = {"iterations": iterations}
    assert_rule(partial(stream_maps, **options), partial(reference.stream_maps, **options), inputs, grads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "width"), [((5,), 4, 40), ((2, 9), 3, 33), ((3,), 2, 1), ((1,), 5, 300)])
def test_update(dtype, rows, n, width, path):
    path.require(dtype)
    inputs = to_update(rows, n, width, dtype, path.device)
    assert_rule(update_streams, reference.update_streams, inputs, [torch.randn(*rows, n, width).to(path.device, dtype)])


@pytest.mark.parametrize("kernels", ["inductor", "eager"])
def test_large_updates(kernels, monkeypatch):
    monkeypatch.setenv("MOTIF_CPU_KERNELS", kernels)
    rows, n, width = 300, 4, 256
    inputs = to_update((rows,), n, width, torch.bfloat16)
    assert_rule(update_streams, reference.update_streams, inputs, [torch.randn(rows, n, width).bfloat16()])
    apart = torch.stack([inputs[0], inputs[0]], 1)[:, 1]  # contiguous in nothing but the last dimension
    torch.testing.assert_close(update_streams(apart, *inputs[1:]), update_streams(*inputs), rtol=0, atol=0)


def test_sums_of_rows_that_are_clamped(path):
    """A row whose entries are all e^-40 of its columns': the sum is below 1e-8, and then is not."""
    products = torch.zeros(3, products_of(4), dtype=torch.float64)
    products[:, 8:] = 20.0
    products[0, 8:12] = -20.0
    products[1, 8:24:4] = -20.0
    products[2, [9, 10, 11, 12, 14, 15, 16, 17]] = -20.0
    inputs = leaves(products.to(path.device), torch.zeros(20, dtype=torch.float64, device=path.device))
    grads = [torch.randn(3, 4), torch.randn(3, 4, 4)]
    grads = [g.double().to(path.device) for g in grads]
    ours = run(lambda *a: stream_maps(*a, iterations=20), inputs, grads)
    plain = run(lambda *a: reference.stream_maps(*a, iterations=20), inputs, grads)
    for o, p in zip(ours, plain, strict=True):
        torch.testing.assert_close(o, p, atol=1e-12, rtol=1e-9)


def loop(streams, weight, bias, out):
    """A token, a stream and a number at a time, in float64."""
    n = streams.shape[1]
    reads, updated = np.zeros_like(out), np.zeros_like(streams)
    for t, token in enumerate(streams):
        flat = token.reshape(-1) / np.sqrt(np.mean(token**2) + 1e-6)
        logits = [sum(w * x for w, x in zip(row, flat, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
        gates = [1 / (1 + math.exp(-min(max(v, -10), 10))) for v in logits[: 2 * n]]
        matrix = np.array([math.exp(min(max(v, -20), 20)) for v in logits[2 * n :]]).reshape(n, n)
        for _ in range(20):
            for i in range(n):
                matrix[i] /= max(sum(matrix[i]), 1e-8)
            for j in range(n):
                matrix[:, j] /= max(sum(matrix[:, j]), 1e-8)
        reads[t] = sum(gates[i] * token[i] for i in range(n))
        for i in range(n):
            updated[t, i] = sum(matrix[i, j] * token[j] for j in range(n)) + gates[n + i] * out[t]
    return reads, updated


@pytest.mark.parametrize("seed", [0, 46, 78])  # in the last two, sums of rows are clamped
def test_it_is_the_loop(path, seed):
    torch.manual_seed(seed)
    streams, weight, _ = to_read((3,), 4, 7)
    weight[:, :5] *= 40
    bias, out = torch.randn(products_of(4)), torch.randn(3, 7)
    reads, updated = loop(*(t.double().numpy() for t in (streams, weight, bias, out)))
    streams, weight, bias, out = (t.to(path.device, torch.float64) for t in (streams, weight, bias, out))
    read, products = read_streams(streams, weight, bias[:4])
    post, mix = stream_maps(products, bias[4:])
    torch.testing.assert_close(read.cpu(), torch.from_numpy(reads), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        update_streams(streams, out, post, mix).cpu(), torch.from_numpy(updated), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
def test_no_rows(rows, path):
    read = leaves(*to_read(rows, 4, 6, device=path.device))
    out, products = read_streams(*read)
    assert (out.shape, products.shape) == ((*rows, 6), (*rows, 24))
    maps = leaves(*to_map(rows, 4, device=path.device))
    post, mix = stream_maps(*maps)
    assert (post.shape, mix.shape) == ((*rows, 4), (*rows, 4, 4))
    update = leaves(*to_update(rows, 4, 6, device=path.device))
    for outs, inputs in (((out, products), read), ((post, mix), maps), ((update_streams(*update),), update)):
        assert all(not g.any() for g in torch.autograd.grad([o.sum() for o in outs], inputs))


def test_one_output_alone_passes_a_gradient(path):
    """The other's is then absent, not zeros."""
    for function, plain, inputs in (
        (read_streams, reference.read_streams, to_read((3,), 4, 6, device=path.device)),
        (
            stream_maps,
            lambda *a: reference.stream_maps(*a, iterations=20),
            to_map((3,), 4, device=path.device),
        ),
    ):
        inputs = leaves(*inputs)
        for i in range(2):
            ours = torch.autograd.grad(function(*inputs)[i].square().sum(), inputs, allow_unused=True)
            other = torch.autograd.grad(
                plain(*inputs)[i].square().sum(), inputs, allow_unused=True, materialize_grads=True
            )
            torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_views(path):
    """Streams that are one hidden state expanded, and every second token of a wider tensor."""
    x = torch.randn(5, 12, device=path.device)
    _, weight, bias = to_read((5,), 4, 12, device=path.device)
    wide = torch.randn(10, 6, 20, device=path.device)
    for streams in (x.unsqueeze(-2).expand(5, 4, 12), wide[::2, 1:5, 3:15]):
        for ours, same in zip(
            read_streams(streams, weight, bias), read_streams(streams.contiguous(), weight, bias), strict=True
        ):
            assert torch.equal(ours, same)
        _, out, post, mix = to_update((5,), 4, 12, device=path.device)
        mixed = update_streams(streams, out, post, mix.mT)
        assert torch.equal(mixed, update_streams(streams.contiguous(), out, post, mix.mT.contiguous()))


def test_what_lies_around_the_rows_does_not_matter(path):
    """Rows in a buffer that is NaN everywhere else, more than 2^31 elements apart."""
    buffer = torch.empty(2**31 + 128, dtype=torch.float16, device=path.device)  # pages nobody touches cost nothing
    buffer[:64] = buffer[-64:] = torch.nan
    streams = buffer[8:].as_strided((2, 3, 11), (2**31 + 16, 13, 1))
    streams.copy_(torch.linspace(-1, 1, 66).view(2, 3, 11))
    _, weight, bias = to_read((2,), 3, 11, device=path.device)
    _, out, post, mix = to_update((2,), 3, 11, torch.float16, path.device)
    grads = torch.ones(2, 11, device=path.device), torch.ones(2, 15, device=path.device)
    for a, b in zip(
        run(read_streams, leaves_of_views(streams, weight, bias), grads),
        run(read_streams, leaves(streams, weight, bias), grads),
        strict=True,
    ):
        assert torch.equal(a, b)
    grad = [torch.ones(2, 3, 11, device=path.device)]
    for a, b in zip(
        run(update_streams, leaves_of_views(streams, out, post, mix), grad),
        run(update_streams, leaves(streams, out, post, mix), grad),
        strict=True,
    ):
        assert torch.equal(a, b)


def leaves_of_views(*tensors):
    """Leaves that keep their strides."""
    return [t.detach().requires_grad_() for t in tensors]


def test_bitwise_the_same_twice(path):
    rows = 70
    read, update = to_read((rows,), 4, 48, device=path.device), to_update((rows,), 4, 48, device=path.device)
    maps = to_map((rows,), 4, device=path.device)
    for function, inputs in ((read_streams, read), (stream_maps, maps), (update_streams, update)):
        inputs = leaves(*inputs)
        outs = function(*inputs)
        grads = [torch.randn_like(o) for o in (outs if isinstance(outs, tuple) else (outs,))]
        first, second = run(function, inputs, grads), run(function, inputs, grads)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_operators():
    """Schemas, fake rules, derivatives, and a graph of the whole block."""
    samples = [
        (torch.ops.motif.read_streams, (*leaves(*to_read((2, 3), 4, 5)), 1e-6)),
        (torch.ops.motif.stream_maps, (*leaves(*to_map((2, 3), 4)), 3)),
        (torch.ops.motif.update_streams, leaves(*to_update((2, 3), 4, 5, torch.bfloat16))),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator, tuple(arguments))
    streams, weight, bias = to_read((2, 3), 4, 5)
    _, products, r = torch.ops.motif.read_streams(streams, weight, bias, 1e-6)
    torch.library.opcheck(
        torch.ops.motif.read_streams_backward,
        (torch.randn(2, 3, 5), None, streams, weight, bias, products, r),
    )
    torch.library.opcheck(torch.ops.motif.stream_maps_backward, (torch.randn(2, 3, 4), None, *to_map((2, 3), 4), 3))
    torch.library.opcheck(torch.ops.motif.update_streams_backward, (torch.randn(2, 3, 4, 5), *to_update((2, 3), 4, 5)))


def block(streams, weight, bias, out_weight):
    """A sublayer that multiplies."""
    n = streams.shape[-2]
    read, products = read_streams(streams, weight, bias[:n])
    post, mix = stream_maps(products, bias[n:], iterations=3)
    return update_streams(streams, read * out_weight, post, mix)


def block_inputs():
    streams, weight, _ = to_read((2, 3), 4, 5)
    return leaves(streams, weight, torch.randn(24), torch.randn(5))


def test_compiles_without_graph_breaks():
    inputs, grad = block_inputs(), [torch.randn(2, 3, 4, 5)]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ours, plain in zip(run(compiled, inputs, grad), run(block, inputs, grad), strict=True):
        torch.testing.assert_close(ours, plain)


def test_autocast_changes_nothing():
    inputs, grad = block_inputs(), [torch.randn(2, 3, 4, 5)]
    plain = run(block, inputs, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = run(block, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_shapes_alone_on_the_meta_device():
    inputs = [t.detach().to("meta").requires_grad_() for t in block_inputs()]
    out = block(*inputs)
    out.sum().backward()
    assert out.is_meta
    assert all(t.grad.shape == t.shape for t in inputs)


def test_nothing_wide_is_kept_but_the_arguments():
    """Streams in bfloat16 are kept as they are, once."""
    streams, weight, bias, _ = block_inputs()
    streams = streams.detach().bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        read, products = read_streams(streams, weight, bias[:4])
        post, mix = stream_maps(products, bias[4:])
        out = read.detach()
        update_streams(streams, out, post, mix)
    allowed = {t.data_ptr() for t in (streams, weight, bias, out, products, post, mix)}
    assert all(t.data_ptr() in allowed or t.numel() <= 20 for t in kept)  # biases, a token's RMS


def test_errors_name_the_thing():
    streams, weight, bias = to_read((2,), 4, 5)
    with pytest.raises(ValueError, match=r"weight has shape \(24, 19\); it must be \(products, 20\)"):
        read_streams(streams, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); it must be \(4,\)"):
        read_streams(streams, weight, bias[1:])
    with pytest.raises(TypeError, match=r"streams has dtype torch.int64"):
        read_streams(streams.long(), weight, bias)
    with pytest.raises(ValueError, match="24 products and 19 biases"):
        stream_maps(torch.randn(2, 24), torch.randn(19))
    with pytest.raises(TypeError, match=r"products has dtype torch.bfloat16; it must be float32 or float64"):
        stream_maps(torch.randn(2, 24).bfloat16(), torch.randn(20))
    with pytest.raises(ValueError, match="iterations is -1"):
        stream_maps(torch.randn(2, 24), torch.randn(20), iterations=-1)
    streams, out, post, mix = to_update((2,), 4, 5)
    with pytest.raises(ValueError, match=r"mix has shape \(2, 4, 3\); it must be \(2, 4, 4\)"):
        update_streams(streams, out, post, mix[..., 1:])
    with pytest.raises(ValueError, match=r"out has shape \(1, 5\); it must be \(2, 5\)"):
        update_streams(streams, out[:1], post, mix)


def test_agrees_with_liger_kernel(path):
    """Within the clamps, which it does not have; in its interpreter too."""
    if path.name == "cpu":
        pytest.skip("liger-kernel is made of Triton kernels")
    liger = pytest.importorskip("liger_kernel.ops.mhc", reason="liger-kernel is not installed")
    rows, n, width = 8, 4, 32
    streams, weight, _ = to_read((rows,), n, width, device=path.device)
    bias, out = torch.randn(products_of(n), device=path.device), torch.randn(rows, width, device=path.device)
    grads = torch.randn(rows, width, device=path.device), torch.randn(rows, n, width, device=path.device)

    def ours(streams, weight, bias, out):
        read, products = read_streams(streams, weight, bias[:n])
        return read, update_streams(streams, out, *stream_maps(products, bias[n:]))

    def theirs(streams, weight, bias, out):
        one = torch.ones((), device=path.device)
        numbers = True, 20, 1e-6, 0.0, 0.0, 1.0  # float32, iterations, epsilons, the gates' factor
        pre, post, mix = liger.LigerMHCCoeffsFunction.apply(streams, weight.mT, bias, one, one, one, *numbers)
        read = liger.LigerMHCPreFunction.apply(streams, pre)
        return read, liger.LigerMHCPostResFunction.apply(streams, out, post, mix)

    inputs = leaves(streams, weight, bias, out)
    for a, b in zip(run(ours, inputs, grads), run(theirs, inputs, grads), strict=True):
        # Its products are in tf32 on a GPU.
        tolerance = 1e-2 if path.name == "cuda" else 1e-5
        torch.testing.assert_close(a, b, atol=tolerance * b.abs().max().item(), rtol=tolerance)
