"""PolyNorm with coefficients of each expert: the error rule, rows of no expert, gradients."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.agreement import assert_agrees
from helpers.interpreter import require_interpreter
from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import grouped_mul_poly_norm, reference
from motif_kernels.grouped_poly_norm import grouped_mul_poly_norm_mxfp8
from motif_kernels.poly_norm import squash

OPTIONS = {"sigmoid_weight": True, "bias_clamp": 0.5, "out_scale": 0.5, "hidden_clamp": 2.0}  # all have an effect
ROWS = 37
OFFSETS = {
    "some empty": [0, 4, 4, 30, 30, 33],  # and four rows are of none
    "one has all": [0, 0, ROWS, ROWS, ROWS, ROWS],
    "none has any": [0] * 6,
    "a row each": [1, 2, 3, 4, 5, 6],
}


def draw(path, dtype, *, rows=ROWS, columns=96, ends="some empty"):
    """Gate and up in one tensor, weight, bias, offsets; a gradient. NaN and inf in rows of none."""
    torch.manual_seed(0)
    offsets = torch.tensor(OFFSETS[ends], dtype=torch.int32)
    gate_up, grad = 1.5 * torch.randn(rows, 2 * columns), torch.randn(rows, columns)
    gate_up[offsets[-1] :], grad[offsets[-1] :] = torch.nan, torch.inf
    tensors = gate_up.to(dtype), torch.randn(6, 3), torch.randn(6, 1), offsets, grad.to(dtype)
    return [t.to(path.device) for t in tensors]


def by_expert(gate_up, weight, bias, offsets, *, dtype=None, **options):
    """A loop over experts, as one writes it down."""
    gate, up = gate_up.chunk(2, dim=-1)
    compute, bound, scale = reference.compute_dtype(gate), options["hidden_clamp"], options["out_scale"]
    weight, bias = squash(weight, bias, options["sigmoid_weight"], options["bias_clamp"], 1.0, compute)
    parts = [gate[:0].to(dtype or gate.dtype)]
    for e, (start, end) in enumerate(pairwise([0, *offsets.tolist()])):
        x, u = (t[start:end].to(compute).clamp(-bound, bound) for t in (gate, up))
        y = (reference.poly_norm(x, weight[e], bias[e]) * u).clamp(-bound, bound) * scale
        parts.append(y.to(dtype or gate.dtype))
    out = torch.cat(parts)
    return torch.cat((out, out.new_zeros(len(gate) - len(out), gate.shape[1])))


def results(function, gate_up, weight, bias, offsets, grad, precision=None):
    inputs = leaves(gate_up, weight, bias, dtype=precision)
    out = function(*inputs, offsets, **OPTIONS)
    return [out, *gradients(out, inputs, grad)]


def joined(gate_up, *rest, **options):
    return grouped_mul_poly_norm(gate_up, None, *rest, **options)


def cut(gate_up, *rest, **options):
    """Of strided halves."""
    return grouped_mul_poly_norm(*gate_up.chunk(2, dim=-1), *rest, **options)


def assert_held(function, *arguments):
    """To the error rule; the results."""
    ours, plain = results(function, *arguments), results(by_expert, *arguments)
    exact = results(partial(by_expert, dtype=torch.float64), *arguments, precision=torch.float64)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact, strict=True)):
        # As in test_poly_norm: gradients of coefficients add rounded rows.
        floor = torch.finfo(torch.float32).eps * max(1.0, e.abs().max().item()) * len(ours[0]) ** 0.5 if i > 1 else None
        assert_error_rule(o, p, e, floor=floor)
    return ours


@pytest.mark.parametrize("ends", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [joined, cut])
def test_error_rule_forward_and_backward(ends, dtype, function, path):
    path.require(dtype)
    *inputs, offsets, grad = draw(path, dtype, ends=ends)
    ours = assert_held(function, *inputs, offsets, grad)
    end = offsets[-1]
    assert not ours[0][end:].any()
    assert not ours[1][end:].any()


@pytest.mark.parametrize("columns", [1, 45, 17000])
def test_rows_of_any_width(columns, path):
    """Odd ones, and such as are longer than a block."""
    *inputs, offsets, grad = draw(path, torch.float32, rows=7, columns=columns, ends="a row each")
    found = results(joined, *inputs, offsets, grad)
    exact = results(by_expert, *inputs, offsets, grad, precision=torch.float64)
    for ours, other in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), other, atol=4e-6 * other.abs().max().item(), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernels", ["inductor", "eager"])
def test_large_arrays_on_a_cpu(dtype, kernels, monkeypatch):
    """Compiled, and by blocks."""
    monkeypatch.setenv("MOTIF_CPU_KERNELS", kernels)
    offsets = torch.tensor([0, 100, 100, 290], dtype=torch.int32)
    gate_up, grad = torch.randn(300, 2 * 1000).to(dtype), torch.randn(300, 1000).to(dtype)
    assert_held(joined, gate_up, torch.randn(4, 3), torch.randn(4, 1), offsets, grad)


def test_float64(path):
    *inputs, offsets, grad = draw(path, torch.float64)
    arguments = *inputs, offsets, grad, torch.float64
    for ours, other in zip(results(joined, *arguments), results(by_expert, *arguments), strict=True):
        # The interpreter's inverse square root is float32's.
        assert_agrees(ours, other, 1e-12 if path.name != "interpreter" else 1e-6)


@pytest.mark.parametrize("experts", [1, 2, 3, 8, 384])
def test_every_row_finds_its_expert(experts, path):
    """Of any number, of which any may be empty."""
    torch.manual_seed(experts)
    offsets = torch.randint(0, 50, (experts,), dtype=torch.int32).sort().values
    x = torch.ones(50, 3)
    bias = torch.arange(1.0, experts + 1)[:, None]
    out = grouped_mul_poly_norm(
        *(t.to(path.device) for t in (x, x, torch.zeros(experts, 3), bias, offsets)), hidden_clamp=None
    )
    group, none = reference.rows_of_groups(offsets, 50)
    assert torch.equal(out[:, 0].cpu(), (group + 1.0).masked_fill(none, 0))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, path):
    offsets = torch.full((6,), rows, dtype=torch.int32)
    *inputs, _, grad = draw(path, torch.float32, rows=rows)
    inputs[0] = torch.randn_like(inputs[0])
    arguments = *inputs, offsets.to(path.device), torch.ones_like(grad)
    for ours, other in zip(results(joined, *arguments), results(by_expert, *arguments), strict=True):
        torch.testing.assert_close(ours, other, atol=2e-6, rtol=2e-6)


def test_the_same_bits_every_time(path):
    *inputs, offsets, grad = draw(path, torch.float32)
    for function in (joined, cut):
        first, second = (results(function, *inputs, offsets, grad) for _ in "ab")
        assert all(map(torch.equal, first, second))


def test_rows_more_than_two_to_the_31_elements_apart(path):
    buffer = torch.empty(2**31 + 128, dtype=torch.float16, device=path.device)  # pages nobody touches cost nothing
    buffer[:64] = buffer[-128:] = torch.nan
    far = buffer[8:].as_strided((2, 22), (2**31 + 16, 1))
    far.copy_(torch.linspace(-1, 1, 44).view(2, 22))
    weight, bias = torch.rand(2, 3, device=path.device), torch.rand(2, 1, device=path.device)
    offsets = torch.tensor([1, 2], dtype=torch.int32, device=path.device)
    found = []
    for gate_up in (far.detach().requires_grad_(), far.clone().requires_grad_()):
        out = joined(gate_up, weight, bias, offsets)
        found.append([out, *gradients(out, [gate_up], torch.ones_like(out))])
    for a, b in zip(*found, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


@pytest.mark.parametrize("one_tensor", [True, False])
def test_operator_contract(one_tensor, path):
    gate_up, weight, bias, offsets, _ = draw(path, torch.float32, rows=9, columns=5, ends="a row each")
    gate, up = (gate_up.nan_to_num(), None) if one_tensor else gate_up.nan_to_num().chunk(2, dim=-1)
    gate, up, weight, bias = leaves(gate, up, weight, bias)
    arguments = gate, up, weight, bias, offsets, 1e-6, 1.5, 0.75, torch.float32, True
    torch.library.opcheck(torch.ops.motif.grouped_poly_norm.default, arguments)


@pytest.mark.parametrize("function", [joined, cut])
def test_compiled_and_recomputed_it_is_the_same(function, path):
    *inputs, offsets, grad = draw(path, torch.float32, columns=9)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = results(function, *inputs, offsets, grad)
    for other in (compiled, partial(checkpoint, function, use_reentrant=False)):
        for a, b in zip(results(other, *inputs, offsets, grad), expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_backward_saves_its_inputs_and_three_numbers_a_row(path):
    *inputs, offsets, _ = draw(path, torch.float32, columns=9)
    inputs = leaves(*inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        joined(*inputs, offsets)
    own = {t.data_ptr() for t in (*inputs, offsets)}
    assert [t.shape for t in saved if t.data_ptr() not in own] == [(3, ROWS)]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((4, 7), None, (2, 3), (2, 1)), r"gate has shape \(4, 7\); it must be \(T, 2 N\)"),
        (((4, 6), (4, 5), (2, 3), (2, 1)), r"up has shape \(4, 5\) but gate has \(4, 6\)"),
        (((4, 6), (4, 6), (2, 4), (2, 1)), r"weight has shape \(2, 4\)"),
    ],
)
def test_refuses_with_a_reason(shapes, message):
    tensors = [None if shape is None else torch.ones(shape) for shape in shapes]
    with pytest.raises(ValueError, match=message):
        grouped_mul_poly_norm(*tensors, torch.tensor([1, 4], dtype=torch.int32))


def same_bits(ours, theirs):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(ours, theirs, strict=True))


def of_all_sizes():
    """Rows of 32 from the smallest numbers to the largest; zeros, infinity and NaN among them."""
    torch.manual_seed(0)
    x = torch.randn(400, 2, 32) * torch.exp2(torch.randint(-140, 126, (400, 2, 1)).float())
    x[:4, 0] = torch.tensor([0.0, -0.0, 448.0, 449.0])[:, None]
    x[4, 0, 3], x[5, 1, 7] = torch.inf, torch.nan
    return x.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp8_is_torchaos(dtype):
    to_mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor").to_mx
    mode = pytest.importorskip("torchao.prototype.mx_formats.config").ScaleCalculationMode.RCEIL
    x = of_all_sizes().to(dtype)
    scales, values = to_mx(x, torch.float8_e4m3fn, 32, mode)
    assert same_bits(reference.to_mxfp8(x), (values, scales))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [32, 96, 17024])
def test_mxfp8_is_that_of_the_result(dtype, columns, path):
    path.require(dtype)
    gate_up, weight, bias, offsets, _ = draw(path, dtype, rows=7, columns=columns, ends="a row each")
    gate_up[2, 1] = torch.inf  # NaN in its row
    for gate, up in ((gate_up, None), gate_up.chunk(2, dim=-1)):
        arguments = gate, up, weight, bias, offsets
        ours = grouped_mul_poly_norm_mxfp8(*arguments, **OPTIONS)
        assert same_bits(ours, reference.to_mxfp8(grouped_mul_poly_norm(*arguments, **OPTIONS)))


def test_mxfp8_in_a_kernel_of_all_sizes():
    """Of the gate that is 1 everywhere PolyNorm is 1: what is left is up."""
    require_interpreter()
    from motif_kernels.impl.triton import poly_norm

    up = of_all_sizes()
    weight, bias, offsets = torch.zeros(1, 3), torch.ones(1, 1), torch.tensor([len(up)], dtype=torch.int32)
    numbers = {"eps": 1e-6, "hidden_clamp": None, "out_clamp": None}
    ours = poly_norm.forward_mxfp8(torch.ones_like(up), up, weight, bias, offsets, **numbers)
    assert same_bits(ours, reference.to_mxfp8(up))


def test_mxfp8_operator_contract(path):
    gate_up, weight, bias, offsets, _ = draw(path, torch.float32, columns=64)
    arguments = gate_up, None, weight, bias, offsets, 1e-6, 1.5, 0.75
    torch.library.opcheck(torch.ops.motif.grouped_poly_norm_mxfp8.default, arguments, test_utils="test_faketensor")
    with pytest.raises(ValueError, match="N is 33; it must be a multiple of 32"):
        grouped_mul_poly_norm_mxfp8(gate_up[:, :66], None, weight, bias, offsets)
