"""PolyNorm: the published figures, the error rule, extreme inputs, gradients and the operator's contract."""

import pytest
import torch

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import mul_poly_norm, poly_norm, reference
from motif_kernels.cpu.poly_norm import _poly_norm

WEIGHT = torch.tensor([0.2, 0.3, 0.5])
BIAS = torch.tensor([0.125])


def plain_poly_norm(x, weight, bias, eps=1e-6):
    """The formula of arXiv 2411.03884 in the input's own precision."""

    def normalise(z):
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)

    return weight[0] * normalise(x**3) + weight[1] * normalise(x**2) + weight[2] * normalise(x) + bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", [poly_norm, reference.poly_norm])
def test_known_figures(function, dtype):
    x = torch.tensor([[-1.5, -0.5, 0.0], [0.5, 1.0, 2.0]], dtype=dtype)
    expected = torch.tensor(
        [[-0.5263191243, -0.1043004407, 0.125], [0.3508009409, 0.6717202625, 1.7277992322]], dtype=dtype
    )
    weight, bias = torch.tensor([0.2, 0.3, 0.5], dtype=dtype), torch.tensor([0.125], dtype=dtype)
    out = function(x, weight, bias, eps=1e-6)
    torch.testing.assert_close(out, expected, atol=2e-7 if dtype == torch.float32 else 6e-11, rtol=0)


def rows(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    torch.manual_seed(0)
    x = torch.randn(shape)
    return {
        "random": x,
        "large": x * 2e4,
        "tiny": x * 1e-4,
        "constant": torch.full(shape, 0.75),
        "zero": torch.zeros(shape),
        "one hot": torch.nn.functional.one_hot(torch.arange(shape[0]) % shape[1], shape[1]).float() * 3,
    }[kind]


@pytest.mark.parametrize("kind", ["random", "large", "tiny", "constant", "zero", "one hot"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_up", [False, True])
def test_error_rule_forward_and_backward(kind, dtype, with_up):
    x = rows(kind, (37, 96)).clamp(-60000, 60000).to(dtype)  # float16 ends at 65504
    up, grad = torch.randn(2, 37, 96).to(dtype)

    def run(function, precision):
        inputs = leaves(x, up, WEIGHT, BIAS, dtype=precision)
        inputs[2:] = leaves(WEIGHT, BIAS, dtype=torch.float64 if precision == torch.float64 else torch.float32)
        out = function(*inputs)
        used = inputs if with_up else [inputs[0], *inputs[2:]]
        return [out, *gradients(out, used, grad)]

    if with_up:
        ours = run(mul_poly_norm, dtype)
        plain = run(lambda a, b, w, c: (plain_poly_norm(a.float(), w, c) * b.float()).to(dtype), dtype)
        exact = run(lambda a, b, w, c: plain_poly_norm(a, w, c) * b, torch.float64)
    else:
        ours = run(lambda a, b, w, c: poly_norm(a, w, c), dtype)
        plain = run(lambda a, b, w, c: plain_poly_norm(a.float(), w, c).to(dtype), dtype)
        exact = run(lambda a, b, w, c: plain_poly_norm(a, w, c), torch.float64)
    for o, p, e in zip(ours, plain, exact, strict=True):
        # The weight's and bias's gradients add 37 rows, each rounded: their rounding floor is that of a random walk
        # of 37 steps, which the three or one numbers of the plain result may by luck undercut.
        floor = torch.finfo(torch.float32).eps * e.abs().max().item() * 37**0.5 if e.ndim == 1 else None
        assert_error_rule(o, torch.nan_to_num(p), e, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 257, 65536])
def test_finite_up_to_a_million(dtype, columns):
    x = (torch.linspace(-1e6, 1e6, 3 * columns).reshape(3, columns)).to(dtype).requires_grad_()
    weight, bias = leaves(WEIGHT, BIAS)
    out = poly_norm(x, weight, bias)
    exact = plain_poly_norm(x.detach().double(), WEIGHT.double(), BIAS.double())
    # The terms are of order 1 and may cancel: the error is held to the rounding of the largest of them.
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)
    for grad in torch.autograd.grad(out.sum(), (x, weight, bias)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("shape", [(5,), (1, 1), (0, 7), (2, 0, 7), (2, 3, 4, 5), (3, 70000)])
def test_any_leading_shape(shape):
    x = torch.randn(shape)
    torch.testing.assert_close(poly_norm(x, WEIGHT, BIAS), reference.poly_norm(x, WEIGHT, BIAS), atol=2e-6, rtol=2e-6)


def test_strided_inputs_and_gradients():
    fused = torch.randn(6, 50, requires_grad=True)
    gate, up = fused.chunk(2, dim=-1)
    grad = torch.randn(25, 6).t()
    ours = torch.autograd.grad(mul_poly_norm(gate, up, WEIGHT, BIAS), fused, grad)[0]
    exact = torch.autograd.grad(reference.mul_poly_norm(gate, up, WEIGHT, BIAS), fused, grad)[0]
    torch.testing.assert_close(ours, exact)


def test_gradcheck_in_float64():
    inputs = leaves(torch.randn(4, 7), torch.randn(4, 7), WEIGHT, BIAS, dtype=torch.float64)
    assert torch.autograd.gradcheck(mul_poly_norm, inputs)
    assert torch.autograd.gradcheck(poly_norm, [inputs[0], *inputs[2:]])


@pytest.mark.parametrize("with_up", [True, False])
def test_operator_contract(with_up):
    x, up, weight, bias = leaves(torch.randn(4, 9), torch.randn(4, 9), WEIGHT, BIAS)
    torch.library.opcheck(_poly_norm, (x, up if with_up else None, weight, bias, 1e-6))


def test_compiles_without_a_graph_break():
    x, up, weight, bias = leaves(torch.randn(4, 9), torch.randn(4, 9), WEIGHT, BIAS)
    compiled = torch.compile(mul_poly_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, up, weight, bias), mul_poly_norm(x, up, weight, bias), atol=0, rtol=0)


def test_backward_saves_only_its_inputs():
    x, up, weight, bias = leaves(torch.randn(64, 512), torch.randn(64, 512), WEIGHT, BIAS)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        mul_poly_norm(x, up, weight, bias)
    assert set(saved) == {t.data_ptr() for t in (x, up, weight, bias)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4), torch.ones(1)), r"weight has shape \(4,\)"),
        ((torch.ones(2, 3), torch.ones(3), torch.ones(2)), r"bias has shape \(2,\)"),
        ((torch.ones(2, 0), torch.ones(3), torch.ones(1)), "last dimension"),
        ((torch.ones(2, 3, dtype=torch.int64), torch.ones(3), torch.ones(1)), "floating-point"),
    ],
)
def test_refuses_with_a_reason(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        poly_norm(*arguments)


def test_up_must_match_the_gate():
    with pytest.raises(ValueError, match=r"up has shape \(2, 4\)"):
        mul_poly_norm(torch.ones(2, 3), torch.ones(2, 4), WEIGHT, BIAS)
    with pytest.raises(TypeError, match="bfloat16"):
        mul_poly_norm(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16), WEIGHT, BIAS)
