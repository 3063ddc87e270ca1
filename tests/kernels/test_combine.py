"""The epilogue: the error rule for every form of lambda, with sub-norm, gate and neither."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_combine, reference
from motif_kernels.combine import combine

B, S, HEADS, NOISE, WIDTH = 2, 9, 6, 2, 8


def make_inputs(lam_shape, epilogue, dtype=torch.float32, leading=(B, S), device="cpu"):
    torch.manual_seed(1)
    signal, noise = torch.randn(*leading, HEADS, WIDTH).to(dtype), torch.randn(*leading, NOISE, WIDTH).to(dtype)
    lam = 0.4 if lam_shape is None else 0.4 + 0.1 * torch.randn(lam_shape)
    weight = 1 + 0.1 * torch.randn(WIDTH) if epilogue == "norm" else None
    gate = torch.randn(*leading, HEADS, WIDTH).to(dtype) if epilogue == "gate" else None
    return [t.to(device) if isinstance(t, torch.Tensor) else t for t in (signal, noise, lam, weight, gate)]


def run(function, inputs, grad, *, precision=None, **options):
    signal, noise, lam, weight, gate = inputs = leaves(*inputs, dtype=precision)
    out = function(signal, noise, lam, norm_weight=weight, gate=gate, **options)
    return [out, *gradients(out, inputs, grad)]


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
@pytest.mark.parametrize("lam_shape", [None, (), (HEADS,), (B, S, HEADS)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule(lam_shape, epilogue, dtype, path):
    path.require(dtype)
    inputs = make_inputs(lam_shape, epilogue, dtype, device=path.device)
    grad = torch.randn(B, S, HEADS, WIDTH).to(path.device)
    options = {"norm_eps": 1e-5, "out_scale": 0.7}
    ours = run(diff_combine, inputs, grad, **options)
    plain = run(lambda *a, **k: reference.diff_combine(*a, **k).to(dtype), inputs, grad, **options)
    exact = run(reference.diff_combine, inputs, grad, precision=torch.float64, **options)
    assert ours[0].dtype == dtype
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert o.shape == e.shape
        assert_error_rule(o, p, e, precision=dtype)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_gradcheck_in_float64(epilogue, path):
    inputs = [t for t in make_inputs((1, 3, HEADS), epilogue, leading=(1, 3), device=path.device) if t is not None]
    inputs = leaves(*inputs, dtype=torch.float64)

    def function(signal, noise, lam, extra=None):
        name = {"norm": "norm_weight", "gate": "gate"}.get(epilogue)
        return diff_combine(signal, noise, lam, out_scale=0.8, **({name: extra} if name else {}))

    assert torch.autograd.gradcheck(function, inputs, fast_mode=path.name == "interpreter")


def test_packed_layout_is_the_batched_one():
    inputs = make_inputs((B, S, HEADS), "norm")
    batched = diff_combine(*inputs[:3], norm_weight=inputs[3])
    packed = diff_combine(*(t.flatten(0, 1) for t in inputs[:3]), norm_weight=inputs[3])
    torch.testing.assert_close(packed.view_as(batched), batched, atol=0, rtol=0)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_one_token_needs_no_leading_dimension(epilogue):
    signal, noise, lam, weight, gate = make_inputs((HEADS,), epilogue, leading=())
    out = diff_combine(signal, noise, lam, norm_weight=weight, gate=gate)
    expected = reference.diff_combine(signal, noise, lam, norm_weight=weight, gate=gate)
    torch.testing.assert_close(out, expected)


def test_blocks_of_tokens_join_up():
    """More tokens than one cache block holds."""
    inputs = make_inputs((HEADS,), "norm", leading=(5000,))
    grad = torch.randn(5000, HEADS, WIDTH)
    for o, e in zip(
        run(diff_combine, inputs, grad), run(reference.diff_combine, inputs, grad, precision=torch.float64), strict=True
    ):
        torch.testing.assert_close(o.double(), e, atol=1e-4 if o.ndim == 1 else 1e-5, rtol=1e-5)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_operator_contract(epilogue, path):
    signal, noise, lam, weight, gate = leaves(*make_inputs((4, HEADS), epilogue, leading=(4,), device=path.device))
    torch.library.opcheck(
        torch.ops.motif.diff_combine.default, (signal, noise, lam, weight, gate, 1e-5, 0.7, torch.float32, None, None)
    )


@pytest.mark.parametrize("kind", ["large", "tiny", "constant", "zero"])
@pytest.mark.parametrize("epilogue", ["norm", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_rule_on_unusual_values(kind, epilogue, dtype, path):
    """Constant and zero heads make a difference of nothing but rounding, or of nothing."""
    path.require(dtype)
    signal, noise, lam, weight, gate = make_inputs((HEADS,), epilogue, dtype, device=path.device)
    scale = {"large": 3e3, "tiny": 1e-4, "zero": 0.0, "constant": 1.0}[kind]
    if kind == "constant":
        signal, noise = torch.full_like(signal, 0.75), torch.full_like(noise, 0.75)
    if gate is not None:
        gate = gate * (30 if kind == "large" else 1)
    inputs = [(signal * scale).to(dtype), (noise * scale).to(dtype), lam, weight, gate]
    grad = torch.randn(B, S, HEADS, WIDTH).to(path.device)
    ours = run(diff_combine, inputs, grad)
    plain = run(lambda *a, **k: reference.diff_combine(*a, **k).to(dtype), inputs, grad)
    exact = run(reference.diff_combine, inputs, grad, precision=torch.float64)
    for o, p, e in zip(ours, plain, exact, strict=True):
        assert_error_rule(o, p, e, precision=dtype)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("width", [1, 5, 64, 96])
def test_every_ratio_and_width(ratio, width, path):
    torch.manual_seed(2)
    signal, noise = torch.randn(5, 2 * ratio, width), torch.randn(5, 2, width)
    inputs = [t.to(path.device) for t in (signal, noise, torch.rand(5, 2 * ratio), torch.rand(width))] + [None]
    grad = torch.randn(5, 2 * ratio, width).to(path.device)
    for o, e in zip(
        run(diff_combine, inputs, grad), run(reference.diff_combine, inputs, grad, precision=torch.float64), strict=True
    ):
        torch.testing.assert_close(o.double(), e, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_strided_inputs(epilogue, path):
    """Heads as slices of one attention output, as GDA's blocks lie; strided gradients."""
    torch.manual_seed(3)
    block = torch.randn(B, S, NOISE, HEADS // NOISE + 1, WIDTH, device=path.device)
    signal, noise = block[..., :-1, :].flatten(2, 3), block[..., -1, :]
    wide = torch.randn(B, S, HEADS, 2 * WIDTH, device=path.device)
    weight = torch.rand(WIDTH, device=path.device) if epilogue == "norm" else None
    inputs = [wide[..., ::1][..., :WIDTH], noise, 0.3, weight, signal if epilogue == "gate" else None]
    grad = torch.randn(B, HEADS, S, WIDTH, device=path.device).transpose(1, 2)
    options = {"norm_weight": weight, "gate": inputs[4]}
    tensors = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs[:3]]
    ours = diff_combine(*tensors, **options)
    exact = reference.diff_combine(*tensors, **options)
    for o, e in zip([ours, *gradients(ours, tensors, grad)], [exact, *gradients(exact, tensors, grad)], strict=True):
        torch.testing.assert_close(o, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("epilogue", ["norm", "gate"])
def test_what_lies_around_the_heads_does_not_matter(epilogue, path):
    """Heads in a buffer that is NaN everywhere else, tokens more than 2^31 elements apart."""
    buffer = torch.empty(2**31 + 256, dtype=torch.float16, device=path.device)  # pages nobody touches cost nothing
    buffer[:256] = buffer[-256:] = torch.nan
    signal = buffer[8:].as_strided((2, 2, 11), (2**31 + 64, 20, 1))
    signal.copy_(torch.linspace(-1, 1, 44).view(2, 2, 11))
    results = []
    for wide in (signal, signal.clone()):
        inputs = [wide.detach().requires_grad_(), wide[:, :1].detach().requires_grad_(), 0.3]
        options = {"norm_weight": torch.ones(11, device=path.device)} if epilogue == "norm" else {"gate": wide}
        out = diff_combine(*inputs, **options)
        results.append([out, *gradients(out, inputs, torch.ones(2, 2, 11, device=path.device))])
    for a, b in zip(*results, strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_gradients_are_the_same_every_time(path):
    inputs = leaves(*make_inputs((B, S, HEADS), "norm", device=path.device))
    grad = torch.randn(B, S, HEADS, WIDTH, device=path.device)
    for a, b in zip(run(diff_combine, inputs, grad), run(diff_combine, inputs, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate"])
def test_compiles_and_checkpoints(epilogue, path):
    inputs = leaves(*make_inputs((B, S, HEADS), epilogue, device=path.device))
    grad = torch.randn(B, S, HEADS, WIDTH, device=path.device)

    def function(signal, noise, lam, weight, gate):
        return diff_combine(signal, noise, lam, norm_weight=weight, gate=gate, out_scale=0.8)

    expected = gradients(function(*inputs), inputs, grad)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for out in (compiled(*inputs), checkpoint(function, *inputs, use_reentrant=False)):
        torch.testing.assert_close(out, function(*inputs), atol=0, rtol=0)
        for a, b in zip(gradients(out, inputs, grad), expected, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_backward_saves_only_its_inputs(path):
    signal, noise, lam, weight, _ = leaves(*make_inputs((B, S, HEADS), "norm", device=path.device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        diff_combine(signal, noise, lam, norm_weight=weight)
    assert set(saved) == {t.data_ptr() for t in (signal, noise, lam, weight)}


@pytest.mark.parametrize("epilogue", ["norm", "gate", "none"])
def test_heads_in_two_pieces_are_as_good_as_whole(epilogue, path):
    """What attention libraries give that take narrow values alone. Bit for bit, but for what comes
    of a sum over a head: a GPU's compiler orders that by how the pieces lie in registers.
    """
    inputs = make_inputs((B, S, HEADS), epilogue, device=path.device)
    options = {"norm_eps": 1e-5, "out_scale": 0.7}
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5)).to(path.device)

    def in_pieces(signal, noise, lam, *, norm_weight, gate, **options):
        pieces = (t.split(WIDTH // 2, dim=-1) for t in (signal, noise))
        return combine(*pieces, lam, norm_weight=norm_weight, gate=gate, **options)

    whole, halves = (run(function, inputs, grad, **options) for function in (diff_combine, in_pieces))
    plain = run(reference.diff_combine, inputs, grad, **options)
    exact = run(reference.diff_combine, inputs, grad, precision=torch.float64, **options)
    given = zip(("signal", "noise", "lam", "weight", "gate"), inputs, strict=True)
    names = ["out", *(name for name, t in given if t is not None)]
    for name, half, one, p, e in zip(names, halves, whole, plain, exact, strict=True):
        if path.name == "cuda" and (epilogue == "norm" or name == "lam"):
            assert_error_rule(half, p, e)
        else:
            assert torch.equal(half, one), name


def test_operator_contract_with_two_pieces(path):
    signal, noise, lam, weight, _ = make_inputs((HEADS,), "norm", device=path.device)
    (s1, s2), (n1, n2) = (t.flatten(0, 1).split(WIDTH // 2, dim=-1) for t in (signal, noise))
    tensors = leaves(*(t.clone() for t in (s1, n1, lam, weight, s2, n2)))
    arguments = (*tensors[:4], None, 1e-5, 0.7, torch.float32, *tensors[4:])
    torch.library.opcheck(torch.ops.motif.diff_combine.default, arguments)


@pytest.mark.gpu
def test_autocast_on_cuda_gives_float32_with_the_norm_only():
    signal, noise, lam, weight, _ = make_inputs((HEADS,), "norm", torch.bfloat16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert diff_combine(signal, noise, lam, norm_weight=weight).dtype == torch.float32
        assert diff_combine(signal, noise, lam).dtype == torch.bfloat16


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
