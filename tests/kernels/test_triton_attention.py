"""The fused attention kernels: in Triton's interpreter, and on a GPU where there is one."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers.interpreter import require_interpreter, small_tiles
from helpers.numerics import assert_error_rule, gradients, leaves
from helpers.plain_attention import plain_diff_attention
from motif_kernels import diff_attn_func, diff_attn_varlen_func, flops
from motif_kernels.ops import diff_attention as operator
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences

triton = pytest.importorskip("triton", reason="the Triton kernels need triton")
WIDTHS = [(64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128)]
OPTIONS = AttentionOptions(softmax_scale=0.25, left=-1, right=0, norm_eps=1e-5, out_scale=1.0, deterministic=True)
fused = partial(diff_attn_func, backend="triton")
fused_varlen = partial(diff_attn_varlen_func, backend="triton")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "interpreter":
        require_interpreter()
    return "cpu" if request.param == "interpreter" else "cuda"


@pytest.fixture(autouse=True)
def tiles():
    """Small ones in the interpreter."""
    if not triton.knobs.runtime.interpret:
        yield
        return
    with small_tiles():
        yield


def tensors(device, *, b=1, sq=70, sk=70, hs=2, hn=2, hk=(2, 2, 2), d=16, dv=32, lam=(), dtype=torch.float32, seed=0):
    """q1, k1, q2, k2, v, lam; lam is a shape, or "token" for one number a token and head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    shapes = [(sq, hs, d), (sk, hk[0], d), (sq, hn, d), (sk, hk[1], d), (sk, hk[2], dv)]
    lam_shape = (b, sq, hs) if lam == "token" else lam
    values = [normal(b, *s).to(device, dtype) for s in shapes]
    return [*values, (0.4 + 0.2 * normal(*lam_shape)).to(device)]


def extras(epilogue, inputs, seed=1):
    """norm_weight and gate for an epilogue."""
    generator = torch.Generator().manual_seed(seed)
    q1, v = inputs[0], inputs[4]
    if epilogue == "norm":
        return [(1 + 0.2 * torch.randn(v.shape[-1], generator=generator)).to(q1.device), None]
    if epilogue == "gate":
        return [None, torch.randn(*q1.shape[:-1], v.shape[-1], generator=generator).to(q1.device, q1.dtype)]
    return [None, None]


def run(function, inputs, extra, grad, dtype=None, **options):
    inputs = leaves(*inputs, *extra, dtype=dtype)
    out = function(*inputs[:6], norm_weight=inputs[6], gate=inputs[7], **options)
    return [out, *gradients(out, inputs, grad)]


def compare(function, other, inputs, extra, *, atol=2e-5, rtol=2e-5, **options):
    """Results and gradients of two functions on the same inputs, the other in float64."""
    grad = torch.randn(*inputs[0].shape[:-1], inputs[4].shape[-1], generator=torch.Generator().manual_seed(9))
    grad = grad.to(inputs[0].device)
    ours = run(function, inputs, extra, grad, **options)
    exact = run(other, inputs, extra, grad, dtype=torch.float64, **options)
    for o, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(o.double(), e, atol=atol * max(1, e.abs().max().item()), rtol=rtol)


reference = partial(diff_attn_func, backend="reference")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "epilogue", "lam"), [(1, "norm", ()), (4, "gate", "token"), (3, "none", "heads")])
@pytest.mark.parametrize(("d", "dv"), WIDTHS)
def test_error_rule(d, dv, group, epilogue, lam, dtype, device):
    """Every promised pair of widths, against float64 and plain PyTorch."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter is wrong in bfloat16")
    if device == "cpu" and dtype == torch.float32 and (d, dv) not in ((64, 128), (96, 192)):
        pytest.skip("in the interpreter, float32 runs the same code at two widths")
    size = 40 if device == "cpu" else 333
    lam = (2 * group,) if lam == "heads" else lam
    inputs = tensors(device, sq=size, sk=size + 9, hs=2 * group, d=d, dv=dv, lam=lam, dtype=dtype)
    extra = extras(epilogue, inputs)
    grad = torch.randn(1, size, 2 * group, dv, generator=torch.Generator().manual_seed(2)).to(device)
    options = {"causal": True, "out_scale": 0.7}
    ours = run(fused, inputs, extra, grad, **options)
    plain = run(plain_diff_attention, inputs, extra, grad, **options)
    exact = run(reference, inputs, extra, grad, dtype=torch.float64, **options)
    for o, p, e in zip(ours, plain, exact, strict=True):
        # Gradients of lambda and of the norm's weight add up rows, each rounded: a random walk of
        # that many steps, which the few numbers of the plain result may by luck undercut.
        step = torch.finfo(dtype).eps * e.abs().max().clamp(min=1).item()
        if e.ndim == 0:  # a sum that may cancel: its steps are as inexact as the plain ones
            terms = [*inputs[:5], inputs[5].expand(1, size, 2 * group)]
            step = max(step, _error_of_lambda(terms, extra, grad, dtype, options))
        assert_error_rule(o, p, e, precision=dtype, floor=step * (2 * group * size) ** 0.5 if e.ndim < 2 else None)


def _error_of_lambda(inputs, extra, grad, dtype, options):
    """The largest of plain PyTorch's errors in the gradient of one lambda a token and head."""
    plain = run(plain_diff_attention, inputs, extra, grad, **options)[6]
    exact = run(reference, inputs, extra, grad, dtype=torch.float64, **options)[6]
    return (plain.double() - exact).abs().max().item()


@pytest.mark.parametrize("window", [(-1, -1), (20, 7), (5, -1), (-1, 11), (0, 0), (300, 300)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sq", "sk"), [(70, 70), (33, 97), (97, 33), (1, 50), (50, 1)])
def test_masks(sq, sk, causal, window, device):
    """Bottom-right causal masks and windows, also with fewer keys than queries."""
    inputs = tensors(device, sq=sq, sk=sk)
    compare(fused, reference, inputs, extras("none", inputs), causal=causal, window_size=window)


@pytest.mark.parametrize(("lam", "epilogue"), list(itertools.product([(), "heads", "token"], ["none", "norm", "gate"])))
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
def test_ratios_lambdas_and_epilogues(ratio, lam, epilogue, device):
    if device == "cpu" and ratio > 2 and (lam, epilogue) not in (((), "norm"), ("heads", "none"), ("token", "gate")):
        pytest.skip("in the interpreter, each lambda and each epilogue once at the larger ratios")
    lam = (2 * ratio,) if lam == "heads" else lam
    inputs = tensors(device, b=2, sq=25, sk=25, hs=2 * ratio, lam=lam)
    compare(fused, reference, inputs, extras(epilogue, inputs), causal=True, out_scale=0.6, norm_eps=1e-3)


@pytest.mark.parametrize("heads", [(4, 4, 4), (2, 2, 2), (1, 1, 1), (4, 2, 1), (1, 4, 2), (2, 1, 4)])
def test_grouped_keys_and_values(heads, device):
    inputs = tensors(device, sq=37, sk=37, hs=8, hn=4, hk=heads)
    compare(fused, reference, inputs, extras("norm", inputs), causal=True)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("group", "key_heads"), [(1, 2), (1, 1), (3, 2)])
def test_shared_keys(group, key_heads, deterministic, device):
    """DIFF V2: both maps have the same keys, whose gradient is the sum of both."""
    heads = {"hs": 2 * group, "hk": (key_heads, key_heads, 2)}
    q1, k, q2, _, v, lam = leaves(*tensors(device, **heads, lam="token"))
    grad = torch.randn(1, 70, 2 * group, 32, device=device)
    out = fused(q1, k, q2, k, v, lam, causal=True, deterministic=deterministic)
    ours = gradients(out, [q1, k, q2, v, lam], grad)
    exact = gradients(reference(q1, k, q2, k, v, lam, causal=True), [q1, k, q2, v, lam], grad)
    for o, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(o, e, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("softcap", [0.5, 20.0])
def test_softcap(softcap, device):
    inputs = tensors(device, hs=4)
    compare(fused, reference, inputs, extras("norm", inputs), causal=True, softcap=softcap, softmax_scale=0.7)


@pytest.mark.parametrize("widths", [(8, 8), (24, 40), (80, 16)])
def test_odd_widths(widths, device):
    inputs = tensors(device, sq=20, sk=20, d=widths[0], dv=widths[1])
    compare(fused, reference, inputs, extras("gate", inputs))


LENGTHS_Q = [5, 0, 40, 1, 33]
LENGTHS_K = [9, 3, 40, 1, 0]


def packed(device, lengths_q, lengths_k, **options):
    """Inputs in one row and the bounds of their documents."""
    inputs = tensors(device, sq=sum(lengths_q), sk=sum(lengths_k), lam="token", hs=4, **options)
    bounds = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device) for n in (lengths_q, lengths_k)
    ]
    return [t[0] for t in inputs], (*bounds, max(lengths_q), max(lengths_k))


@pytest.mark.parametrize("window", [(-1, -1), (6, 0)])
@pytest.mark.parametrize("deterministic", [True, False])
def test_packed_documents(window, deterministic, device):
    """Empty documents, one token, more keys than queries and the other way round."""
    inputs, bounds = packed(device, LENGTHS_Q, LENGTHS_K)
    compare(
        lambda *a, **o: fused_varlen(*a, *bounds, deterministic=deterministic, **o),
        lambda *a, **o: diff_attn_varlen_func(*a, *bounds, backend="reference", **o),
        inputs,
        extras("norm", inputs),
        causal=True,
        window_size=window,
    )


def test_a_document_does_not_depend_on_its_neighbours(device):
    """The bits of its results and gradients are those it has alone, even beside NaN."""
    inputs, bounds = packed(device, [31, 50, 17], [31, 50, 17])
    extra = extras("norm", inputs)
    grad = torch.randn(98, 4, 32, device=device)
    for t in (*inputs, grad):
        t[:31] = t[81:] = torch.nan
    together = run(lambda *a, **o: fused_varlen(*a, *bounds, causal=True, **o), inputs, extra, grad)
    own = slice(31, 81)
    alone_bounds = (torch.tensor([0, 50], dtype=torch.int32, device=device),) * 2
    alone = run(
        lambda *a, **o: fused_varlen(*a, *alone_bounds, 50, 50, causal=True, **o),
        [t[own] for t in inputs],
        extra,
        grad[own],
    )
    for whole, part in zip(together[:7], alone[:7], strict=True):
        assert torch.equal(whole[own], part)


def test_bounds_that_lie_are_cut_to_the_tensors(device, monkeypatch):
    """Past the last token of cu_seqlens there is NaN, which must stay unread. A longest document is
    not read at all.
    """
    buffers = [torch.full((90, *t.shape[2:]), torch.nan, device=device) for t in tensors(device)[:5]]
    views = [b[:30].copy_(t[0, :30]).requires_grad_() for b, t in zip(buffers, tensors(device)[:5], strict=True)]
    lam = torch.tensor(0.3, device=device)
    results = []
    for longest, bounds in ((30, [0, 20, 30]), (3, [-7, 20, 80])):
        bounds = torch.tensor(bounds, dtype=torch.int32, device=device)
        inputs, documents = AttentionInputs(*views, lam), Sequences(longest, longest, bounds, bounds)
        out = operator.diff_attention(*inputs, *documents, *OPTIONS, True)[0]
        results.append([out, *gradients(out, views, torch.ones_like(out))])
    for lying, honest in zip(*results, strict=True):
        assert torch.equal(lying, honest)


@pytest.mark.parametrize("epilogue", ["norm", "gate"])
@pytest.mark.parametrize("window", [(-1, -1), (6, 0)])
def test_tokens_after_the_last_document_are_zero(window, epilogue, device):
    """Whatever they hold, NaN too."""
    inputs, (bounds_q, bounds_k, *_) = packed(device, [5, 70, 40], [9, 61, 50])
    bounds = bounds_q[:-1], bounds_k[:-1]
    inputs += extras(epilogue, inputs)
    grad = torch.randn(115, 4, 32, device=device)
    for t in (inputs[0], inputs[2], inputs[5], grad, *([inputs[7]] if epilogue == "gate" else [])):
        t[75:] = torch.nan
    for t in (inputs[1], *inputs[3:5]):
        t[70:] = torch.nan
    ends = 75, 70, 75, 70, 70, 75, None, 75
    options = {"causal": True, "window_size": window, "return_max_logits": True}
    results = []
    for cut in (False, True):
        used = [t if end is None or t is None or not cut else t[:end] for t, end in zip(inputs, ends, strict=True)]
        used = leaves(*used)
        out, *largest = fused_varlen(*used[:6], *bounds, 70, 70, norm_weight=used[6], gate=used[7], **options)
        results.append([out, *gradients(out, used, grad[: len(out)]), *largest])
    for whole, own in zip(*results, strict=True):
        assert torch.equal(whole[: len(own)], own)
        assert (whole[len(own) :] == 0).all()


def test_fully_masked_rows_are_zero(device):
    inputs = leaves(*tensors(device, sq=60, sk=20))
    out = fused(*inputs, causal=True, norm_weight=torch.ones(32, device=device))
    assert (out[:, :40] == 0).all()
    assert (out[:, 40:] != 0).any()
    grads = gradients(out, inputs, torch.randn(out.shape, device=device))
    assert (grads[0][:, :40] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads)


def test_no_queries_and_no_keys(device):
    for sq, sk in ((0, 8), (8, 0)):
        inputs = leaves(*tensors(device, sq=sq, sk=sk))
        out, signal, noise = fused(*inputs, return_max_logits=True)
        assert out.shape == (1, sq, 2, 32)
        assert (out == 0).all()
        assert (signal == -torch.inf).all()
        assert (noise == -torch.inf).all()
        assert all((g == 0).all() for g in gradients(out, inputs, torch.ones_like(out)))


def test_largest_logits(device):
    inputs = tensors(device, b=2, hs=4, sq=50, sk=70)
    options = {"causal": True, "window_size": (30, 0), "softmax_scale": 0.3, "return_max_logits": True}
    for ours, exact in zip(fused(*inputs, **options)[1:], reference(*inputs, **options)[1:], strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-5)
    inputs, bounds = packed(device, LENGTHS_Q, LENGTHS_K)
    ours = fused_varlen(*inputs, *bounds, causal=True, return_max_logits=True)
    exact = diff_attn_varlen_func(*inputs, *bounds, causal=True, return_max_logits=True, backend="reference")
    for o, e in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(o, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 3])
def test_the_same_bits_every_time(group, device):
    inputs = tensors(device, hs=2 * group, lam="token")
    extra = extras("norm", inputs)
    grad = torch.randn(1, 70, 2 * group, 32, device=device)
    for a, b in zip(*(run(fused, inputs, extra, grad, causal=True) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", [1, 4])
def test_the_one_pass_backward_agrees(group, device):
    inputs = tensors(device, b=2, hs=2 * group, lam="token")
    compare(partial(fused, deterministic=False), reference, inputs, extras("norm", inputs), causal=True)


@pytest.mark.parametrize("column", [4, 5])  # aligned as tensor descriptors need it, or not
def test_strided_inputs_in_poisoned_memory(column, device):
    """Heads as slices of one projection, NaN around them; a gradient with strides."""
    memory = torch.full((2, 60, 12, 48), torch.nan, device=device)
    inputs = tensors(device, b=2, sq=37, sk=37, hs=4)
    views = []
    for i, t in enumerate(inputs[:5]):
        start = (0, 4, 6, 8, 10)[i]
        view = memory[:, 3:40, start : start + t.shape[2], column : column + t.shape[3]]
        views.append(view.copy_(t))
    grad = torch.randn(2, 4, 37, 32, device=device).transpose(1, 2)
    contiguous, strided = leaves(*inputs), [v.detach().requires_grad_() for v in views] + leaves(inputs[5])
    expected, out = (fused(*x, causal=True, norm_weight=torch.ones(32, device=device)) for x in (contiguous, strided))
    assert torch.equal(out, expected)
    for a, b in zip(gradients(out, strided, grad), gradients(expected, contiguous, grad), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensor_descriptors_and_pointers_give_the_same_bits(dtype, device):
    """But for the sub-norm's: it sums a row, which a GPU's compiler orders by how the row lies in
    registers.
    """
    dense = tensors(device, b=2, sq=50, sk=70, hs=4, hk=(1, 2, 1), dtype=dtype)
    together, bounds = packed(device, LENGTHS_Q, LENGTHS_K, dtype=dtype)
    memory = torch.randn(2, 45, 8, 48, device=device, dtype=dtype)
    slices = [memory[:, :40, i : i + 2, 8 : 8 + w] for i, w in ((0, 16), (2, 16), (4, 16), (2, 16), (6, 32))]
    calls = [
        partial(fused, *dense, causal=True, window_size=(20, 0), gate=extras("gate", dense)[1]),
        partial(fused, *dense, softcap=2.0, norm_weight=extras("norm", dense)[0]),
        partial(fused, *slices, 0.3, causal=True),
        partial(fused, slices[0], slices[1], None, None, slices[4], None, window_size=(9, 3)),
        partial(fused_varlen, *together, *bounds, causal=True, norm_weight=extras("norm", together)[0]),
        partial(fused_varlen, *together, *bounds, window_size=(6, 2)),
    ]
    for call in calls:
        outputs = []
        for descriptors in (True, False):
            with small_tiles(descriptors=descriptors):
                outputs.append(call())
        if device == "cuda" and "norm_weight" in call.keywords:
            # The sum is in float32: what it changes is which of two neighbours a result rounds to.
            few = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(*outputs, atol=few, rtol=few)
        else:
            assert torch.equal(*outputs)


def test_repeated_heads_need_no_copy(device):
    """Views with strides of 0, which tensor descriptors cannot have."""
    inputs = tensors(device, b=2, sq=37, sk=37, hk=(1, 1, 1))
    repeated = [t.expand(-1, -1, 2, -1) if i in (1, 3, 4) else t for i, t in enumerate(inputs)]
    assert torch.equal(fused(*repeated, causal=True), fused(*inputs, causal=True))


@pytest.mark.parametrize("kind", ["transposed", "slice", "expanded"])
def test_strided_lambda(kind, device):
    inputs = tensors(device, b=2, sq=37, sk=37, hs=4)
    memory = 0.5 * torch.rand(2, 45, 4, device=device)
    inputs[5] = {
        "transposed": memory[:, :37].transpose(1, 2).contiguous().transpose(1, 2),
        "slice": memory[:, 3:40],
        "expanded": memory[:, :1].expand(2, 37, 4),
    }[kind]
    grad = torch.randn(2, 37, 4, 32, device=device)
    strided = [*leaves(*inputs[:5]), inputs[5].detach().requires_grad_()]
    dense = leaves(*inputs)
    for a, b in zip(gradients(fused(*strided), strided, grad), gradients(fused(*dense), dense, grad), strict=True):
        assert torch.equal(a, b)


def test_gate_and_weight_with_strides(device):
    """A gate for a whole head, and a weight that is every second number."""
    inputs = tensors(device, b=2, sq=37, sk=37, hs=4)
    gate = torch.randn(2, 37, 4, 1, device=device).expand(2, 37, 4, 32)
    weight = torch.rand(64, device=device)[::2]
    grad = torch.randn(2, 37, 4, 32, device=device)
    for options in ({"gate": gate}, {"norm_weight": weight}):
        copies = {name: t.clone(memory_format=torch.contiguous_format) for name, t in options.items()}
        results = []
        for extra in (options, copies):
            given = leaves(*inputs)
            out = fused(*given, **extra)
            results.append([out, *gradients(out, given, grad)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_windows_without_end(device):
    inputs = tensors(device, sq=40, sk=50)
    for window in ((2**31 - 1, 2**31 - 1), (2**40, 0), (2**31 - 1, -1)):
        expected = fused(*inputs, window_size=(100, 0) if window[1] == 0 else (-1, -1))
        torch.testing.assert_close(fused(*inputs, window_size=window), expected, atol=0, rtol=0)


def test_fully_masked_rows_survive_large_gradients_in_float16(device):
    """Loss scaling makes gradients of a thousand; 1 / sqrt(eps) times that is past float16."""
    inputs = leaves(*tensors(device, sq=40, sk=20, dtype=torch.float16))
    out = fused(*inputs, causal=True, norm_weight=torch.ones(32, device=device))
    grads = gradients(out, inputs, torch.full(out.shape, 1000.0, device=device))
    assert all(torch.isfinite(g).all() for g in grads)


def test_compiled_once_for_all_lengths(device):
    """Neither tracing nor the kernels depend on a length."""
    traced = []

    def count(graph, _):
        traced.append(graph)
        return graph

    compiled = torch.compile(partial(fused, causal=True), fullgraph=True, backend=count, dynamic=True)
    for length in (20, 24, 41):
        inputs = tensors(device, sq=length, sk=length, lam="token")
        assert torch.equal(compiled(*inputs), fused(*inputs, causal=True))
    assert len(traced) == 1


def test_tokens_far_apart_in_memory(device):
    """More than 2^31 elements between two batch entries."""
    buffer = torch.empty(2**31 + 4096, dtype=torch.float16, device=device)  # pages nobody touches cost nothing
    inputs = tensors(device, b=2, sq=9, sk=9, d=16, dv=16, dtype=torch.float16)
    far = []
    for i, t in enumerate(inputs[:5]):
        view = buffer[i * 300 :].as_strided(t.shape, (2**31 + 16, *t.stride()[1:]))
        far.append(view.copy_(t).detach().requires_grad_())
    near = leaves(*inputs)
    grad = torch.randn(2, 9, 2, 16, device=device)
    a, b = (x(*i) for x, i in ((fused, [*far, near[5]]), (fused, near)))
    assert torch.equal(a, b)
    for g, e in zip(gradients(a, far, grad), gradients(b, near[:5], grad), strict=True):
        assert torch.equal(g, e)


@pytest.mark.parametrize("epilogue", ["none", "norm", "gate", "shared keys"])
def test_operator_contract(epilogue, device):
    inputs = leaves(*tensors(device, sq=9, sk=9), *extras(epilogue, tensors(device, sq=9, sk=9)))
    if epilogue == "shared keys":
        inputs[3] = None
    options = OPTIONS._replace(out_scale=0.8)
    torch.library.opcheck(torch.ops.motif.diff_attention.default, (*inputs, *Sequences(9, 9), *options, True))


@pytest.mark.slow
def test_compiles_and_checkpoints(device):
    inputs = leaves(*tensors(device, hs=4, lam="token"))
    packed_inputs, bounds = packed(device, [20, 30], [20, 30])
    packed_inputs = leaves(*packed_inputs)
    weight = torch.ones(32, device=device)

    def dense(*x):
        return fused(*x, causal=True, norm_weight=weight, window_size=(20, 0))

    def varlen(*x):
        return fused_varlen(*x, *bounds, causal=True)

    def same_keys(q1, k, q2, v, lam):
        return fused(q1, k, q2, k, v, lam)

    q1, k, q2, _, *rest = inputs
    for function, x in ((dense, inputs), (varlen, packed_inputs), (same_keys, [q1, k, q2, *rest])):
        expected = function(*x)
        grad = torch.randn(expected.shape, device=device)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for out in (compiled(*x), checkpoint(function, *x, use_reentrant=False)):
            assert torch.equal(out, expected)
            for a, b in zip(gradients(out, x, grad), gradients(expected, x, grad), strict=True):
                assert torch.equal(a, b)
            expected = function(*x)


def test_without_gradients_nothing_is_saved(device):
    inputs = leaves(*tensors(device))
    with torch.no_grad():
        results = torch.ops.motif.diff_attention  # the operator's own results, before the public function drops them
        saved = results(*AttentionInputs(*inputs), *Sequences(70, 70), *OPTIONS, False)
    assert all(t.numel() == 0 for t in saved[1:])
    recorded = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: recorded.append(t) or t, lambda t: t), torch.no_grad():
        fused(*inputs)
    assert not recorded


def test_flops_are_those_of_the_mathematics(device):
    inputs = leaves(*tensors(device, b=2, hs=4))
    with FlopCounterMode(display=False) as counter:
        out = fused(*inputs, causal=True)
        forward = counter.get_total_flops()
        out.sum().backward()
    pairs = 2 * flops.visible_pairs(70, 70, causal=True)
    assert forward == flops.diff_attention_flops(pairs, 4, 2, 16, 32)
    assert counter.get_total_flops() - forward == flops.diff_attention_backward_flops(pairs, 4, 2, 16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": 300}, "query and key heads of width 300: the kernels take at most 256"),
        ({"dv": 300}, "value heads of width 300"),
        ({"dtype": torch.float64}, "float64: the kernels take"),
        ({"hs": 4, "hn": 2, "hk": (4, 2, 2)}, "4 heads of k1 and 2 noise heads"),
    ],
)
def test_refuses_with_a_reason(change, message, device):
    with pytest.raises(ValueError, match=message):
        fused(*tensors(device, sq=4, sk=4, **change))


def test_refuses_what_a_grid_or_32_bits_cannot_hold(device):
    inputs = [t.expand(65537, *t.shape[1:]) for t in tensors(device, sq=4, sk=4)[:5]]
    with pytest.raises(ValueError, match="a batch of 65537"):
        fused(*inputs, 0.3)
    inputs = tensors(device, sq=1, sk=2)
    inputs[4] = torch.empty((1 << 24) + 64, device=device).as_strided((1, 2, 2, 32), (1, 1 << 24, 32, 1))
    with pytest.raises(ValueError, match=r"v with tokens 16777216 elements apart.*call v.contiguous\(\)"):
        fused(*inputs)


def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="Triton kernels need a CUDA GPU"):
        fused(*tensors("cpu", sq=4, sk=4))


@pytest.mark.gpu
def test_lengths_do_not_recompile():
    """A kernel is compiled for a shape of heads, not for a length."""
    from motif_kernels.impl.triton.attention_forward import _forward_kernel

    fused(*tensors("cuda", sq=512, sk=512, dtype=torch.bfloat16), causal=True)
    before = sum(len(cache[0]) for cache in _forward_kernel.device_caches.values())
    for length in (100, 333, 1024, 1):
        fused(*tensors("cuda", sq=length, sk=length, dtype=torch.bfloat16), causal=True)
    assert sum(len(cache[0]) for cache in _forward_kernel.device_caches.values()) == before
