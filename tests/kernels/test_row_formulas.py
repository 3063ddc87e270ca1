"""Formulas over rows on the CPU: fused by a compiler or in blocks, they are the same formulas."""

import sys
from subprocess import run

import pytest
import torch
import torch.nn.functional as F

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_combine, mul_poly_norm, poly_norm, reference, rms_norm
from motif_kernels.ops.rms_norm import rms_norm as operator

TOKENS, WIDTH = 96, 3000  # enough to be compiled; tails of vectors and of blocks included


def poly_norm_inputs():
    return [*torch.randn(2, TOKENS, WIDTH), torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.125])]


def combine_inputs():
    lam = torch.rand(TOKENS, 24)
    return [torch.randn(TOKENS, 24, 125), torch.randn(TOKENS, 6, 125), lam, torch.rand(125) + 0.5]


def gated_inputs():
    return [*combine_inputs()[:3], torch.randn(TOKENS, 24, 125)]


CASES = {
    "poly_norm": (poly_norm_inputs, mul_poly_norm, reference.mul_poly_norm),
    "combine": (
        combine_inputs,
        lambda s, n, lam, w: diff_combine(s, n, lam, norm_weight=w, out_scale=0.7),
        lambda s, n, lam, w: reference.diff_combine(s, n, lam, norm_weight=w, out_scale=0.7),
    ),
    "gated combine": (
        gated_inputs,
        lambda s, n, lam, g: diff_combine(s, n, lam, gate=g),
        lambda s, n, lam, g: reference.diff_combine(s, n, lam, gate=g),
    ),
    "rms_norm": (
        lambda: [torch.randn(TOKENS, WIDTH), torch.rand(WIDTH) + 0.5],
        lambda x, w: rms_norm(x, w, 1e-6),
        lambda x, w: F.rms_norm(x, (WIDTH,), w, 1e-6),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["inductor", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_error_rule_of_large_arrays(name, dtype, kernels, monkeypatch):
    monkeypatch.setenv("MOTIF_CPU_KERNELS", kernels)
    make, function, formula = CASES[name]
    torch.manual_seed(0)
    inputs = [t.to(dtype) for t in make()]

    def result(function, precision):
        given = leaves(*inputs, dtype=precision)
        out = function(*given)
        torch.manual_seed(1)
        return [out, *gradients(out, given, torch.randn(out.shape).to(dtype))]

    ours, exact = result(function, dtype), result(formula, torch.float64)
    plain = result(lambda *given: formula(*given).to(dtype), dtype)
    for o, p, e in zip(ours, plain, exact, strict=True):
        # Sums over all rows round as often: their floor is a random walk's.
        floor = torch.finfo(o.dtype).eps * e.abs().max().item() * TOKENS**0.5 if e.ndim == 1 else None
        assert_error_rule(o, p, e, precision=dtype, floor=floor)


@pytest.mark.slow
def test_compiled_code_takes_the_numbers_of_each_call(monkeypatch):
    """A number that varies between calls is not the first call's (as it was with torch 2.13's)."""
    monkeypatch.setenv("MOTIF_CPU_KERNELS", "inductor")
    inputs = leaves(*poly_norm_inputs())
    for bound, eps in ((1.0, 1e-6), (0.5, 1e-3), (0.25, 1e-1)):
        out = mul_poly_norm(*inputs, hidden_clamp=bound, eps=eps)
        clamped = [t.clamp(-bound, bound) for t in inputs[:2]]
        expected = reference.mul_poly_norm(*clamped, *inputs[2:], eps=eps)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        for a, b in zip(
            gradients(out, inputs, torch.ones_like(out)), gradients(expected, inputs, torch.ones_like(out)), strict=True
        ):
            torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-5)


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_and_done_without(tmp_path):
    program = """
import torch, warnings
from motif_kernels import rms_norm
x = torch.randn(512, 1024)
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    outs = [rms_norm(x, None, 1e-6) for _ in range(2)]
expected = torch.nn.functional.rms_norm(x, (1024,), None, 1e-6)
for out in outs:
    torch.testing.assert_close(out, expected)
print([str(w.message) for w in found if w.category is RuntimeWarning])
"""
    environment = {"CXX": "/bin/false", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("MOTIF_CPU_KERNELS=eager") == 1


def test_what_is_asked_for_is_named_where_it_is_not_known(monkeypatch):
    monkeypatch.setenv("MOTIF_CPU_KERNELS", "fast")
    with pytest.raises(ValueError, match="MOTIF_CPU_KERNELS is 'fast'"):
        mul_poly_norm(*poly_norm_inputs())


@pytest.mark.parametrize("weight", [None, torch.rand(7, dtype=torch.float64) + 0.5])
def test_rms_norm_is_torchs(weight):
    x = torch.randn(3, 5, 7, dtype=torch.float64)
    given = [t for t in (x, weight) if t is not None]
    results = []
    for function in (lambda x, w=None: operator(x, w, 1e-3), lambda x, w=None: F.rms_norm(x, (7,), w, 1e-3)):
        inputs = leaves(*given)
        out = function(*inputs)
        results.append([out, *gradients(out, inputs, x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.motif.rms_norm.default, (x.requires_grad_(), weight, 1e-3))


@pytest.mark.parametrize("rows", [3, 600])  # 600 are enough to be compiled
@pytest.mark.parametrize("weight", [(1,), (511,), (3, 512)])
def test_rms_norm_refuses_a_weight_that_is_not_one_number_a_column(rows, weight):
    with pytest.raises(ValueError, match=r"weight has shape .* must be \(512,\)"):
        rms_norm(torch.randn(rows, 512), torch.ones(weight), 1e-6)


@pytest.mark.parametrize("rows", [3, 600])
def test_rms_norm_refuses_whole_numbers(rows):
    with pytest.raises(TypeError, match=r"torch\.int64.* floating-point"):
        rms_norm(torch.ones(rows, 512, dtype=torch.int64), None, 1e-6)


@pytest.mark.slow
def test_vmap_maps_rows_without_gradients(monkeypatch):
    """Where operators are passed by, a transform of torch.func must still find them."""
    monkeypatch.setenv("MOTIF_CPU_KERNELS", "inductor")
    x = torch.randn(2, 600, 512)
    weight, bias = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.125])
    with torch.no_grad():
        for function in (lambda t: rms_norm(t, None, 1e-6), lambda t: poly_norm(t, weight, bias)):
            torch.testing.assert_close(torch.func.vmap(function)(x), function(x))


def test_rms_norm_returns_no_view() -> None:
    """FSDP2 hangs its backward pass on what a module returns, and warns of views."""
    x, w = torch.randn(1 << 9, 1 << 9, requires_grad=True), torch.ones(1 << 9, requires_grad=True)
    y = rms_norm(x, w, 1e-6)
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "motif::rms_normBackward"
    assert y._base is None
