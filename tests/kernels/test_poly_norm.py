"""PolyNorm: published figures, the error rule, extreme inputs, gradients."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import mul_poly_norm, poly_norm, reference

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


def small_inputs(path, dtype=None):
    """Leaves gate, up, weight and bias."""
    tensors = (torch.randn(4, 9), torch.randn(4, 9), WEIGHT, BIAS)
    return leaves(*(t.to(path.device) for t in tensors), dtype=dtype)


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
def test_error_rule_forward_and_backward(kind, dtype, with_up, path):
    path.require(dtype)
    x = rows(kind, (37, 96)).clamp(-60000, 60000).to(path.device, dtype)  # float16 ends at 65504
    up, grad = torch.randn(2, 37, 96).to(path.device, dtype)
    weight, bias = WEIGHT.to(path.device), BIAS.to(path.device)

    def run(function, precision):
        inputs = leaves(x, up, weight, bias, dtype=precision)
        inputs[2:] = leaves(weight, bias, dtype=torch.float64 if precision == torch.float64 else torch.float32)
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
        # The weight's and bias's gradients add 37 rows, each rounded: their rounding floor is that
        # of a random walk of 37 steps, which the three or one numbers of the plain result may by
        # luck undercut.
        floor = torch.finfo(torch.float32).eps * e.abs().max().item() * 37**0.5 if e.ndim == 1 else None
        assert_error_rule(o, torch.nan_to_num(p), e, floor=floor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 257, 65536])
def test_finite_up_to_a_million(dtype, columns, path):
    path.require(dtype)
    x = (torch.linspace(-1e6, 1e6, 3 * columns).reshape(3, columns)).to(path.device, dtype).requires_grad_()
    weight, bias = leaves(WEIGHT.to(path.device), BIAS.to(path.device))
    out = poly_norm(x, weight, bias)
    exact = plain_poly_norm(x.detach().double(), weight.double(), bias.double())
    # The terms are of order 1 and may cancel: the error is held to the rounding of the largest of
    # them.
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=torch.finfo(dtype).eps)
    for grad in torch.autograd.grad(out.sum(), (x, weight, bias)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("shape", [(5,), (1, 1), (0, 7), (2, 0, 7), (2, 3, 4, 5), (3, 70000)])
def test_any_leading_shape(shape, path):
    x, weight, bias = torch.randn(shape, device=path.device), WEIGHT.to(path.device), BIAS.to(path.device)
    torch.testing.assert_close(poly_norm(x, weight, bias), reference.poly_norm(x, weight, bias), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("columns", [9000, 17000, 40000])
def test_rows_longer_than_a_block(columns, path):
    """Both directions walk through the row twice; also with the moments given."""
    inputs = leaves(*torch.randn(2, 3, columns, device=path.device), WEIGHT.to(path.device), BIAS.to(path.device))
    grad = torch.randn(3, columns, device=path.device)
    out = mul_poly_norm(*inputs)
    exact_inputs = leaves(*inputs, dtype=torch.float64)
    exact = reference.mul_poly_norm(*exact_inputs)
    for ours, other in zip(
        [out, *gradients(out, inputs, grad)], [exact, *gradients(exact, exact_inputs, grad)], strict=True
    ):
        torch.testing.assert_close(ours.double(), other, atol=2e-6 * other.abs().max().item(), rtol=1e-5)


def test_strided_inputs_and_gradients(path):
    fused = torch.randn(6, 50, requires_grad=True, device=path.device)
    gate, up = fused.chunk(2, dim=-1)
    weight, bias = WEIGHT.to(path.device), BIAS.to(path.device)
    grad = torch.randn(25, 6, device=path.device).t()
    ours = torch.autograd.grad(mul_poly_norm(gate, up, weight, bias), fused, grad)[0]
    exact = torch.autograd.grad(reference.mul_poly_norm(gate, up, weight, bias), fused, grad)[0]
    torch.testing.assert_close(ours, exact)


def test_what_lies_around_the_rows_does_not_matter(path):
    """Rows in a buffer that is NaN everywhere else, more than 2^31 elements apart."""
    buffer = torch.empty(2**31 + 64, dtype=torch.float16, device=path.device)  # pages nobody touches cost nothing
    buffer[:64] = buffer[-64:] = torch.nan
    x = buffer[8:].as_strided((2, 11), (2**31 + 16, 1))
    x.copy_(torch.linspace(-1, 1, 22).view(2, 11))
    weight, bias = WEIGHT.to(path.device), BIAS.to(path.device)
    far, near = leaves_of_views(x), leaves(x.clone(), x.clone())
    results = []
    for gate, up in (far, near):
        out = mul_poly_norm(gate, up, weight, bias)
        results.append([out, *gradients(out, [gate, up], torch.ones(2, 11, device=path.device))])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_strided_weights(path):
    x, memory = torch.randn(4, 9, device=path.device), torch.rand(6, device=path.device)
    bias = BIAS.to(path.device)
    assert torch.equal(poly_norm(x, memory[::2], bias), poly_norm(x, memory[::2].clone(), bias))


def leaves_of_views(x):
    """Two leaves that share x's memory, strides and all."""
    return [x.detach().requires_grad_() for _ in range(2)]


def test_gradients_are_the_same_every_time(path):
    inputs = leaves(*torch.randn(2, 50, 300, device=path.device), WEIGHT.to(path.device), BIAS.to(path.device))
    first, second = (gradients(mul_poly_norm(*inputs), inputs, torch.ones(50, 300, device=path.device)) for _ in "ab")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("with_up", [False, True])
def test_variants_of_later_models(with_up, path):
    """Squashed weights, clamped bias and inputs, scaled output, against float64."""
    options = {"sigmoid_weight": True, "bias_clamp": 0.5, "out_scale": 0.7, "hidden_clamp": 1.25}
    x, up, grad = torch.randn(3, 11, 70, device=path.device)
    weight, bias = torch.tensor([0.2, -1.0, 0.5], device=path.device), torch.tensor([0.8], device=path.device)
    inputs = leaves(x, up, weight, bias)
    exact_inputs = leaves(x, up, weight, bias, dtype=torch.float64)

    def written_out(x, up, weight, bias):
        y = reference.poly_norm(x.clamp(-1.25, 1.25), torch.sigmoid(weight), bias.clamp(-0.5, 0.5))
        return 0.7 * (y * up.clamp(-1.25, 1.25) if with_up else y)

    def ours(x, up, weight, bias):
        return mul_poly_norm(x, up, weight, bias, **options) if with_up else poly_norm(x, weight, bias, **options)

    used = slice(None) if with_up else slice(0, 4, 2)  # bias is clamped: its gradient is 0
    results = []
    for function, args in ((ours, inputs), (written_out, exact_inputs)):
        out = function(*args)
        results.append([out, *gradients(out, args[used], grad)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=1e-5)


def test_gradcheck_in_float64(path):
    inputs = small_inputs(path, torch.float64)
    assert torch.autograd.gradcheck(mul_poly_norm, inputs)
    assert torch.autograd.gradcheck(poly_norm, [inputs[0], *inputs[2:]])


@pytest.mark.parametrize("with_up", [True, False])
def test_operator_contract(with_up, path):
    x, up, weight, bias = small_inputs(path)
    torch.library.opcheck(
        torch.ops.motif.poly_norm.default, (x, up if with_up else None, weight, bias, 1e-6, 1.5, torch.float32, True)
    )


def test_compiles_without_a_graph_break(path):
    inputs = small_inputs(path)
    function = partial(mul_poly_norm, sigmoid_weight=True, hidden_clamp=2.0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grad = torch.randn(4, 9, device=path.device)
    out, expected = compiled(*inputs), function(*inputs)
    torch.testing.assert_close(out, expected, atol=0, rtol=0)
    for a, b in zip(gradients(out, inputs, grad), gradients(expected, inputs, grad), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_works_under_activation_checkpointing(path):
    inputs = small_inputs(path)
    grad = torch.randn(4, 9, device=path.device)
    plain = gradients(mul_poly_norm(*inputs), inputs, grad)
    recomputed = gradients(checkpoint(mul_poly_norm, *inputs, use_reentrant=False), inputs, grad)
    for a, b in zip(recomputed, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_autocast_on_cuda_gives_float32_as_layer_norm_does():
    x, up = torch.randn(2, 8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (64,)).dtype == torch.float32
        out = mul_poly_norm(x, up, WEIGHT.cuda(), BIAS.cuda())
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.bfloat16(), mul_poly_norm(x, up, WEIGHT.cuda(), BIAS.cuda()), atol=0, rtol=0)


def test_autocast_on_the_cpu_leaves_the_dtype_as_layer_norm_does():
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.layer_norm(x, (64,)).dtype == poly_norm(x, WEIGHT, BIAS).dtype == torch.bfloat16
        assert torch.nn.functional.layer_norm(x.float(), (64,)).dtype == poly_norm(x.float(), WEIGHT, BIAS).dtype


@pytest.mark.gpu
def test_agrees_with_liger_kernel():
    liger = pytest.importorskip("liger_kernel.ops.poly_norm", reason="liger-kernel is not installed")
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        x, grad = torch.randn(2, 64, 4096, device="cuda", dtype=dtype)
        inputs = leaves(x, WEIGHT.cuda(), BIAS.cuda())
        out = poly_norm(*inputs)
        theirs = liger.LigerPolyNormFunction.apply(*inputs[:2], inputs[2].view(()), 1e-6, False)
        torch.testing.assert_close(out, theirs, atol=tolerance, rtol=tolerance)
        for a, b in zip(gradients(out, inputs, grad), gradients(theirs, inputs, grad), strict=True):
            torch.testing.assert_close(a, b.view_as(a), atol=tolerance * b.abs().max().item(), rtol=tolerance)


def test_backward_saves_its_inputs_and_three_numbers_a_row(path):
    x, up, weight, bias = small_inputs(path)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.update({t.data_ptr(): t}) or t, lambda t: t):
        mul_poly_norm(x, up, weight, bias)
    more = [t for pointer, t in saved.items() if pointer not in {t.data_ptr() for t in (x, up, weight, bias)}]
    assert len(saved) == 5
    assert [(t.shape, t.dtype) for t in more] == [((3, len(x)), torch.float32)]


def test_nothing_is_kept_where_no_gradient_is_needed(path):
    inputs = [t.detach() for t in small_inputs(path)]
    kept = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function is torch.ops.motif.poly_norm.default:
                kept.append(out[1].numel())
            return out

    with Watch():
        mul_poly_norm(*inputs)
    assert kept == [0]


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


def test_refuses_a_clamp_that_leaves_nothing():
    with pytest.raises(ValueError, match="hidden_clamp is 0"):
        poly_norm(torch.ones(2, 3), WEIGHT, BIAS, hidden_clamp=0)


def test_up_must_match_the_gate():
    with pytest.raises(ValueError, match=r"up has shape \(2, 4\)"):
        mul_poly_norm(torch.ones(2, 3), torch.ones(2, 4), WEIGHT, BIAS)
    with pytest.raises(TypeError, match="bfloat16"):
        mul_poly_norm(torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16), WEIGHT, BIAS)
