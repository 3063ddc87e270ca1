"""The epilogue: the error rule for every form of lambda, with sub-norm, gate and neither."""

import pytest
import torch

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_combine, reference
from motif_kernels.cpu.combine import _diff_combine

B, S, HEADS, NOISE, WIDTH = 2, 9, 6, 2, 8


def make_inputs(lam_shape, epilogue, dtype=torch.float32, leading=(B, S)):
    torch.manual_seed(1)
    signal, noise = torch.randn(*leading, HEADS, WIDTH).to(dtype), torch.randn(*leading, NOISE, WIDTH).to(dtype)
    lam = 0.4 if lam_shape is None else 0.4 + 0.1 * torch.randn(lam_shape)
    weight = 1 + 0.1 * torch.randn(WIDTH) if epilogue == "norm" else None
    gate = torch.randn(*leading, HEADS, WIDTH).to(dtype) if epilogue == "gate" else None
    return signal, noise, lam, weight, gate


def run(function, inputs, grad, *, precision=None, **options):
    signal, noise, lam, weight, gate = inputs = leaves(*inputs, dtype=precision)
    out = function(signal, noise, lam, norm_weight=weight, gate=gate, **options)
    return [out, *gradients(out, inputs, grad)]


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
@pytest.mark.parametrize("lam_shape", [None, (), (HEADS,), (B, S, HEADS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(lam_shape, epilogue, dtype):
    inputs = make_inputs(lam_shape, epilogue, dtype)
    grad = torch.randn(B, S, HEADS, WIDTH)
    options = {"norm_eps": 1e-5, "out_scale": 0.7}
    ours = run(diff_combine, inputs, grad, **options)
    plain = run(lambda *a, **k: reference.diff_combine(*a, **k).to(dtype), inputs, grad, **options)
    exact = run(reference.diff_combine, inputs, grad, precision=torch.float64, **options)
    assert ours[0].dtype == dtype
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.shape == e.shape
        assert_error_rule(o, p, e, precision=dtype)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_gradcheck_in_float64(epilogue):
    inputs = [t for t in make_inputs((B, S, HEADS), epilogue) if t is not None]
    inputs = leaves(*inputs, dtype=torch.float64)

    def function(signal, noise, lam, extra=None):
        name = {"norm": "norm_weight", "gate": "gate"}.get(epilogue)
        return diff_combine(signal, noise, lam, out_scale=0.8, **({name: extra} if name else {}))

    assert torch.autograd.gradcheck(function, inputs)


def test_packed_layout_is_the_batched_one():
    inputs = make_inputs((B, S, HEADS), "norm")
    batched = diff_combine(*inputs[:3], norm_weight=inputs[3])
    packed = diff_combine(*(t.flatten(0, 1) for t in inputs[:3]), norm_weight=inputs[3])
    torch.testing.assert_close(packed.view_as(batched), batched, atol=0, rtol=0)


def test_blocks_of_tokens_join_up():
    """More tokens than one cache block holds."""
    inputs = make_inputs((HEADS,), "norm", leading=(5000,))
    grad = torch.randn(5000, HEADS, WIDTH)
    for o, e in zip(
        run(diff_combine, inputs, grad), run(reference.diff_combine, inputs, grad, precision=torch.float64), strict=True
    ):
        torch.testing.assert_close(o.double(), e, atol=1e-4 if o.ndim == 1 else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_operator_contract(epilogue):
    signal, noise, lam, weight, gate = leaves(*make_inputs((4, HEADS), epilogue, leading=(4,)))
    torch.library.opcheck(_diff_combine, (signal, noise, lam, weight, gate, 1e-5, 0.7))


def test_no_tokens():
    signal, noise, lam, weight, _ = leaves(*make_inputs((HEADS,), "norm", leading=(0,)))
    out = diff_combine(signal, noise, lam, norm_weight=weight)
    assert out.shape == (0, HEADS, WIDTH)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (signal, noise, lam, weight)))


def test_refuses_with_a_reason():
    signal, noise, _, weight, _ = make_inputs(None, "norm")
    with pytest.raises(ValueError, match="6 signal heads cannot share 4 noise heads"):
        diff_combine(signal, torch.randn(B, S, 4, WIDTH), 0.5)
    with pytest.raises(ValueError, match=r"lam has shape \(3,\)"):
        diff_combine(signal, noise, torch.ones(3))
    with pytest.raises(ValueError, match="choose the sub-norm or the gate"):
        diff_combine(signal, noise, 0.5, norm_weight=weight, gate=signal)
    with pytest.raises(ValueError, match=r"norm_weight has shape \(5,\)"):
        diff_combine(signal, noise, 0.5, norm_weight=torch.ones(5))
    with pytest.raises(ValueError, match="gate has shape"):
        diff_combine(signal, noise, 0.5, gate=noise)
    with pytest.raises(ValueError, match="all but the number of heads"):
        diff_combine(signal, noise[:, :1], 0.5)
