"""Rows sorted by expert: against a loop over rows, with what lies past the last offset."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.agreement import assert_agrees
from helpers.numerics import gradients, leaves
from motif_kernels import flops, grouped_linear, grouped_mul_poly_norm, mul_poly_norm, reference

OFFSETS = torch.tensor([4, 4, 9], dtype=torch.int32)  # the second expert has no row
ROWS = 12  # and three rows are of none


def rows(width, *, dtype=torch.float64):
    x = torch.randn(ROWS, width, dtype=dtype)
    x[9:] = torch.nan
    return x


def by_loop(function, *inputs):
    """Of each expert's rows in turn, then zeros."""
    parts, start = [], 0
    for e, end in enumerate(OFFSETS.tolist()):
        parts.append(function(e, *(t[start:end] for t in inputs)))
        start = end
    return torch.cat([*parts, torch.zeros(ROWS - start, parts[0].shape[1], dtype=parts[0].dtype)])


def assert_same(ours, plain, inputs):
    assert_agrees(ours, plain, 1e-12)
    grad = torch.randn_like(plain)
    grad[9:] = torch.nan  # nobody reads the gradient of a row of no expert
    for a, b in zip(gradients(ours, inputs, grad), gradients(plain, inputs, grad.nan_to_num()), strict=True):
        assert_agrees(a, b, 1e-12)


@pytest.mark.parametrize("function", [grouped_linear, reference.grouped_linear])
def test_products_are_those_of_a_loop(function):
    inputs = leaves(rows(5), torch.randn(3, 7, 5, dtype=torch.float64))
    plain = by_loop(lambda e, x: x @ inputs[1][e].T, inputs[0])
    ours = function(*inputs, OFFSETS)
    if function is grouped_linear:
        assert_same(ours, plain, inputs)
    else:
        assert_agrees(ours, plain, 1e-12)


@pytest.mark.parametrize("options", [{}, {"sigmoid_weight": True, "bias_clamp": 0.5, "out_scale": 0.5}])
def test_each_expert_has_its_own_coefficients(options):
    weight, bias = torch.randn(3, 3, dtype=torch.float64), torch.tensor([[0.9], [0.1], [-0.3]], dtype=torch.float64)
    inputs = leaves(rows(6), rows(6), weight, bias)
    ours = grouped_mul_poly_norm(*inputs, OFFSETS, **options)
    plain = by_loop(lambda e, g, u: mul_poly_norm(g, u, inputs[2][e], inputs[3][e], **options), *inputs[:2])
    assert_same(ours, plain, inputs)
    firsts = by_loop(lambda e, g, u: mul_poly_norm(g, u, inputs[2][0], inputs[3][0], **options), *inputs[:2])
    assert (ours - firsts).abs().max() > 0.1  # the first expert's for all would be wrong
    if not options:
        assert_agrees(reference.grouped_mul_poly_norm(*inputs, OFFSETS), plain, 1e-12)


def test_the_product_is_clamped_before_it_is_scaled():
    gate, up = torch.tensor([[3.0, -1.0]]), torch.tensor([[2.0, 9.0]])
    weight, bias, offsets = torch.ones(1, 3), torch.zeros(1, 1), torch.tensor([1], dtype=torch.int32)
    plain = mul_poly_norm(gate.clamp(-2, 2), up.clamp(-2, 2), weight[0], bias[0]).clamp(-2, 2) * 0.5
    out = grouped_mul_poly_norm(gate, up, weight, bias, offsets, hidden_clamp=2.0, out_scale=0.5)
    torch.testing.assert_close(out, plain)
    assert plain.max() == 1


def test_gradcheck():
    offsets = torch.tensor([2, 2, 3], dtype=torch.int32)
    gate_up, weight, matrix = leaves(*(torch.randn(s, dtype=torch.float64) for s in ((4, 6), (3, 3), (3, 2, 3))))
    bias = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)

    def feed_forward(gate_up, weight, bias, matrix):
        gate, up = gate_up.chunk(2, dim=-1)
        return grouped_linear(grouped_mul_poly_norm(gate, up, weight, bias, offsets), matrix, offsets)

    assert torch.autograd.gradcheck(feed_forward, (gate_up, weight, bias, matrix))


def test_matrices_more_than_two_to_the_31_elements_apart():
    buffer = torch.empty(2**31 + 64, dtype=torch.float16)  # pages nobody touches cost nothing
    weight = buffer.as_strided((2, 3, 4), (2**31 + 16, 4, 1))
    weight.copy_(torch.linspace(-1, 1, 24).view(2, 3, 4))
    x, offsets = torch.ones(2, 4, dtype=torch.float16), torch.tensor([1, 2], dtype=torch.int32)
    assert torch.equal(grouped_linear(x, weight, offsets), grouped_linear(x, weight.clone(), offsets))


def test_half_precision_and_autocast():
    x, weight = rows(8, dtype=torch.float32), torch.randn(3, 8, 8)
    half = grouped_linear(x.bfloat16(), weight.bfloat16(), OFFSETS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = grouped_linear(x, weight, OFFSETS)
    assert torch.equal(half, cast)
    torch.testing.assert_close(half.float(), grouped_linear(x, weight, OFFSETS), atol=0.1, rtol=0.02)


def test_operations_are_counted():
    assert flops  # imported: registers the formulas
    x, weight = leaves(torch.randn(9, 5), torch.randn(3, 7, 5))
    with FlopCounterMode(display=False) as counter:
        grouped_linear(x, weight, OFFSETS).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 9 * 5 * 7


@pytest.mark.parametrize(
    ("offsets", "error", "match"),
    [
        ([4, 9], ValueError, r"offsets has shape \(2,\).*\(3,\)"),
        ([4, 3, 9], ValueError, "offsets is .*never fall"),
        ([4, 9, 13], ValueError, "offsets is .*12 rows"),
        ([4.0, 4.0, 9.0], TypeError, "offsets is torch.float32.*int32"),
    ],
)
def test_bad_offsets_are_refused(offsets, error, match):
    offsets = torch.tensor(offsets, dtype=torch.int32 if isinstance(offsets[0], int) else None)
    x = torch.zeros(ROWS, 4)
    with pytest.raises(error, match=match):
        grouped_linear(x, torch.zeros(3, 4, 4), offsets)
    with pytest.raises(error, match=match):
        grouped_mul_poly_norm(x, x, torch.zeros(3, 3), torch.zeros(3, 1), offsets)
