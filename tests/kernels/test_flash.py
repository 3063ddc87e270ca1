"""The flash backend on stand-ins for flash-attn, on a CPU."""

import inspect
import itertools
import re
import sys
import types
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.flash_stand_ins import AMPERE, BLACKWELL, GEFORCE, HOPPER, NAMES, StandIn, compute, installing, plain
from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_combine, dispatch, reference
from motif_kernels.impl.flash import attention as flash
from motif_kernels.impl.flash import libraries
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences


@pytest.fixture
def install(monkeypatch):
    """``install(HOPPER, 4, 2)`` puts both on a Hopper GPU and returns the newest."""
    with installing(monkeypatch) as install:
        yield install


GPUS = [(2, AMPERE), (2, HOPPER), (4, HOPPER), (4, BLACKWELL)]
WIDTHS = [(64, 64), (64, 128), (96, 192), (128, 128), (128, 256), (192, 128), (40, 20), (64, 96)]


def inputs(leading_q, leading_k, heads, key_heads, value_heads, d, dv, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (*leading_q, heads, d), (*leading_k, key_heads, d), (*leading_k, value_heads, dv)
    return leaves(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes), dtype=dtype)


def attend(q, k, v, documents=None, **options):
    """The backend's attention on a batch, or on documents: cu_seqlens and longest lengths."""
    if documents is None:
        sequences = Sequences(q.shape[1], k.shape[1])
    else:
        cu_q, cu_k, longest_q, longest_k = documents
        sequences = Sequences(longest_q, longest_k, cu_q, cu_k)
    return flash.attention(q, k, v, sequences, AttentionOptions.of(q.shape[-1], **options))


def both(ours, expected, tensors):
    """Outputs and gradients of the two agree to the last digits of float64."""
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"),
        [ours, *gradients(ours, tensors, grad)],
        [expected, *gradients(expected, tensors, grad)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize(("d", "dv"), WIDTHS)
@pytest.mark.parametrize("key_heads", [2, 4])
def test_every_width_agrees_with_the_reference(install, version, capability, d, dv, key_heads):
    library = install(capability, version)
    q, k, v = inputs((2, 5), (2, 7), 4, key_heads, key_heads, d, dv)
    out = attend(q, k, v, softmax_scale=0.3, causal=True, deterministic=True)
    both(out, plain(q, k, v, None, 0.3, True, (-1, -1), 0.0), [q, k, v])
    assert {call["heads"] for call in library.calls} == {4}
    assert all(call["kv_heads"] == key_heads and call["deterministic"] for call in library.calls)


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize("window", [(-1, -1), (2, 0), (1, 3), (-1, 2), (2, -1), (0, 0), (6, 4), (5, 9)])
@pytest.mark.parametrize(("sq", "sk"), [(7, 7), (3, 8), (11, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_masks(install, version, capability, window, sq, sk, causal):
    install(capability, version)
    q, k, v = inputs((2, sq), (2, sk), 2, 1, 1, 16, 16)
    out = attend(q, k, v, softmax_scale=0.25, causal=causal, window_size=window, softcap=1.5)
    both(out, plain(q, k, v, None, 0.25, causal, window, 1.5), [q, k, v])


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize(
    ("causal", "window"), [(False, (-1, -1)), (True, (-1, -1)), (True, (2, -1)), (False, (-1, 4)), (False, (1, -1))]
)
def test_packed_documents(install, version, capability, causal, window):
    install(capability, version)
    cu_q = torch.tensor([0, 3, 3, 4, 11], dtype=torch.int32)  # the second has no queries, the third no keys
    cu_k = torch.tensor([0, 5, 7, 7, 10], dtype=torch.int32)
    q, k, v = inputs((11,), (10,), 4, 2, 2, 64, 128)
    options = {"causal": causal, "window_size": window, "deterministic": False}
    out = attend(q, k, v, (cu_q, cu_k, 7, 5), softmax_scale=0.1, **options)
    both(out, plain(q, k, v, (cu_q, cu_k), 0.1, causal, window, 0.0), [q, k, v])


@pytest.mark.parametrize(("version", "capability"), GPUS)
def test_tokens_after_the_last_document_are_zero(install, version, capability):
    """The libraries leave them, and their gradients, as they find the memory: NaN here."""

    def spoil(t, total):
        return torch.cat([t[:total], torch.full_like(t[total:], torch.nan)])

    library = install(capability, version)
    run = library.run

    def spoiling(*tensors, **options):
        q, k, v, packing, lengths = tensors
        q, k, v = (t.clone() for t in (q, k, v))
        for t, total in ((q, 8), (k, 9), (v, 9)):
            t.register_hook(partial(spoil, total=total))
        return spoil(run(q, k, v, packing, lengths, **options), 8)

    library.run = spoiling
    cu_q, cu_k = (torch.tensor(bounds, dtype=torch.int32) for bounds in ([0, 3, 8], [0, 5, 9]))
    q, k, v = inputs((11,), (10,), 4, 2, 1, 64, 128)
    out = attend(q, k, v, (cu_q, cu_k, 5, 5), softmax_scale=0.1, causal=True)
    own = q[:8], k[:9], v[:9]
    alone = plain(*own[:2], own[2].expand(-1, 2, -1), (cu_q, cu_k), 0.1, True, (-1, -1), 0.0)
    both(out, torch.cat([alone, torch.zeros_like(out[8:])]), [q, k, v])


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize(
    ("key_heads", "value_heads", "common"), [(6, 2, 6), (2, 6, 6), (2, 3, 6), (4, 1, 4), (1, 4, 4), (1, 12, 12)]
)
def test_key_and_value_heads_are_repeated_only_to_their_least_common_multiple(
    install, version, capability, key_heads, value_heads, common
):
    library = install(capability, version)
    q, k, v = inputs((1, 4), (1, 4), 12, key_heads, value_heads, 64, 128)
    out = attend(q, k, v, softmax_scale=0.3)
    both(out, plain(q, k, v, None, 0.3, False, (-1, -1), 0.0), [q, k, v])
    assert {call["kv_heads"] for call in library.calls} == {common}


def test_strided_inputs_reach_the_library_as_views(install):
    """Slices of one projection, values in two pieces: nothing is copied on the way in."""
    library = install(HOPPER, 2)
    qkv = torch.randn(2, 5, 4 * (64 + 64 + 128), dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (4, -1)) for t in qkv.split([256, 256, 512], dim=-1))
    seen = []
    run = library.run
    library.run = lambda q, k, v, *args, **options: (seen.extend((q, k, v)), run(q, k, v, *args, **options))[1]
    out = attend(q, k, v, softmax_scale=0.3)
    assert len(seen) == 6
    assert {t.untyped_storage().data_ptr() for t in seen} == {qkv.untyped_storage().data_ptr()}
    torch.testing.assert_close(out, plain(q, k, v, None, 0.3, False, (-1, -1), 0.0))


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize(("total_q", "total_k"), [(0, 3), (3, 0), (0, 0)])
def test_empty_tensors_never_reach_the_library(install, version, total_q, total_k):
    library = install(HOPPER, version)
    q, k, v = inputs((total_q,), (total_k,), 2, 1, 1, 16, 32)
    cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (total_q, total_k))
    out = attend(q, k, v, (cu_q, cu_k, total_q, total_k), softmax_scale=1.0)
    assert out.shape == (total_q, 2, 32)
    assert not out.any()
    assert not library.calls
    assert not any(g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


@pytest.mark.parametrize("version", [2, 4])
def test_the_choice_is_made_while_tracing(install, monkeypatch, version):
    """Nothing here breaks a graph, not even the first search for a library."""
    library = install(HOPPER, version)
    monkeypatch.setattr(library, "run", compute)
    q, k, v = inputs((2, 5), (2, 5), 4, 2, 2, 64, 128)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    both(compiled(q, k, v, softmax_scale=0.1, causal=True), plain(q, k, v, None, 0.1, True, (-1, -1), 0.0), [q, k, v])


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 128])
def test_composed_differential_attention_runs_noise_heads_once(install, version, capability, dtype, d):
    """A call for each map and piece of the values, and the epilogue, by the error rule; noise heads
    are not repeated.
    """
    library = install(capability, version)
    tensors = {"q1": (2, 9, 8, d), "k1": (2, 9, 2, d), "q2": (2, 9, 2, d), "k2": (2, 9, 2, d), "v": (2, 9, 2, 2 * d)}
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}
    lam, norm = torch.full((8,), 0.4), torch.linspace(0.5, 1.5, 2 * d)
    grad = torch.randn(2, 9, 8, 2 * d, generator=generator)

    def run(attend, dtype):
        q1, k1, q2, k2, v = leaves(*tensors.values(), dtype=dtype)
        weights = leaves(lam, norm, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        out = diff_combine(attend(q1, k1, v), attend(q2, k2, v), weights[0], norm_weight=weights[1])
        return [out, *gradients(out, [q1, k1, q2, k2, v, *weights], grad)]

    ours = run(lambda q, k, v: attend(q, k, v, softmax_scale=0.125, causal=True), dtype)
    assert {call["heads"] for call in library.calls} == {8, 2}

    def in_plain_pytorch(q, k, v):
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.125
        hidden = ~reference.attention_mask(q.shape[1], k.shape[1], causal=True)
        return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)

    at_precision, exact = run(in_plain_pytorch, dtype), run(in_plain_pytorch, torch.float64)
    for ours_, plain_, exact_ in zip(ours, at_precision, exact, strict=True):
        assert_error_rule(ours_, plain_, exact_, precision=dtype)


@pytest.mark.parametrize("capability", [HOPPER, BLACKWELL])
def test_outputs_in_two_pieces_are_not_copied_together(install, capability):
    """Nor are their gradients cut."""
    install(capability, 4)
    q1, q2, k, v = (
        inputs((1, 5), (1, 5), 4, 2, 2, 128, 256, torch.float16)[0],
        *inputs((1, 5), (1, 5), 2, 2, 2, 128, 256, torch.float16),
    )
    copied = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten.cat.default, torch.ops.aten.split.Tensor):
                copied.append(function)
            return function(*args, **(kwargs or {}))

    tensors = AttentionInputs(q1, k, q2, k, v.detach(), torch.tensor(0.4), torch.ones(256))
    with Watch():
        (out,) = dispatch.attend(tensors, AttentionOptions.of(128, causal=True), backend="flash")
        copied.remove(torch.ops.aten.split.Tensor)  # of the values
        copied.remove(torch.ops.aten.split.Tensor)
        torch.autograd.grad(out, (q1, q2, k), torch.ones_like(out))
    assert not copied
    expected = dispatch.attend(tensors, AttentionOptions.of(128, causal=True), backend="reference")[0]
    torch.testing.assert_close(out, expected, atol=4e-3, rtol=4e-3)


# What a call really costs


def test_no_plan_is_cheaper():
    """Against every number of calls at every pair of widths that kernels are built for."""

    def supported(d, dv):  # a made-up library with a taste for some widths
        return None if (d * 7 + dv * 3) % 5 == 0 else 3 * d + 2 * dv + (d % 3) * 50

    kernel_widths = (32, 64, 96, 128, 192, 256)
    for d, dv in itertools.product(range(8, 140, 12), range(8, 260, 20)):
        plan = libraries.plan_value_width(d, dv, supported)
        calls = -(-dv // plan.piece)
        assert plan.head_dim >= d
        assert plan.v_head_dim >= plan.piece
        ours = calls * supported(plan.head_dim, plan.v_head_dim)
        for width, value_width in itertools.product((w for w in kernel_widths if w >= d), kernel_widths):
            cost = supported(width, value_width)
            assert cost is None or ours <= -(-dv // value_width) * cost, (d, dv, plan, width, value_width)


@pytest.mark.parametrize(
    ("version", "capability", "widths", "grad", "calls"),
    [
        (2, HOPPER, (64, 128), True, [(64, 64)] * 2),
        (2, HOPPER, (192, 128), True, [(192, 192)]),
        (4, HOPPER, (64, 128), True, [(64, 64)] * 2),
        (4, HOPPER, (64, 128), False, [(64, 128)]),
        (4, HOPPER, (192, 128), True, [(192, 192)]),  # with fewer key heads
        (4, BLACKWELL, (64, 128), False, [(64, 128)]),
        (4, BLACKWELL, (192, 128), True, [(192, 128)]),
        (4, BLACKWELL, (128, 256), True, [(128, 128)] * 2),
    ],
)
def test_widths_that_each_library_is_called_at(install, version, capability, widths, grad, calls):
    library = install(capability, version)
    q, k, v = inputs((1, 3), (1, 3), 4, 2, 2, *widths)
    with torch.set_grad_enabled(grad):
        attend(q, k, v, softmax_scale=1.0)
    assert [call["widths"] for call in library.calls] == calls


# Which library, and reasons


@pytest.mark.parametrize(("versions", "newest"), [((), None), ((2,), 2), ((4,), 4), ((4, 2), 4)])
def test_the_newest_library_is_found(install, versions, newest):
    install(HOPPER, *versions)
    assert libraries.installed() == newest


def test_an_older_library_serves_what_the_newest_cannot(install):
    """flash-attn 4 has no backward on Ampere, no deterministic one on consumer Blackwell."""
    for capability in (GEFORCE, AMPERE):
        library = install(capability, 4, 2)
        q, k, v = inputs((1, 3), (1, 3), 2, 1, 1, 64, 64)
        both(attend(q, k, v, softmax_scale=1.0), plain(q, k, v, None, 1.0, False, (-1, -1), 0.0), [q, k, v])
        assert libraries.installed() == 4
        assert not library.calls


def test_a_library_too_old_for_the_arguments_is_not_used(install, monkeypatch):
    install(HOPPER, 2)
    old = sys.modules["flash_attn"]
    monkeypatch.setattr(old, "flash_attn_func", lambda q, k, v, softmax_scale=None, causal=False: q)
    assert libraries.installed() is None
    assert "too old, its flash_attn_func has no deterministic, softcap, window_size" in asked()


def test_a_library_that_fails_to_load_is_named(install, monkeypatch):
    install(HOPPER, 2)

    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("undefined symbol: _ZN2at")

    monkeypatch.setitem(sys.modules, NAMES[2], Broken(NAMES[2]))
    assert libraries.installed() is None
    assert "flash_attn: undefined symbol: _ZN2at" in asked()


def asked(dtype=torch.bfloat16, head_dim=64, value_dim=128, needs_grad=True, device="cpu", **options):
    """Why the backend cannot serve a call of these widths."""
    empty = partial(torch.empty, dtype=dtype, requires_grad=needs_grad, device=device)
    q, v = empty(1, 1, 1, head_dim), empty(1, 1, 1, value_dim)
    inputs, numbers = AttentionInputs(q, q, None, None, v, None), AttentionOptions.of(head_dim, **options)
    return dispatch.unsupported_reason("flash", inputs, Sequences(1, 1), numbers)


@pytest.mark.parametrize(
    ("versions", "capability", "arguments", "words"),
    [
        ((), HOPPER, {}, "no flash-attn is installed"),
        ((2,), None, {}, "tensors on cpu: flash-attn runs on GPUs"),
        ((2,), HOPPER, {"dtype": torch.float32}, "torch.float32: flash-attn takes float16 and bfloat16"),
        ((2,), HOPPER, {"return_max_logits": True}, "return_max_logits=True"),
        ((2,), HOPPER, {"head_dim": 320}, r"head widths \(320, 128\)"),
        ((2,), (7, 5), {}, "compute capability 7.5 is not supported"),
        ((4,), BLACKWELL, {"head_dim": 256, "value_dim": 256, "softcap": 1.0}, "head widths .* has no kernel for them"),
        ((4,), AMPERE, {}, "no backward pass"),
        ((4,), GEFORCE, {}, "deterministic=True"),
        ((4,), GEFORCE, {"deterministic": False, "softcap": 5.0}, "softcap=5.0"),
        ((4,), BLACKWELL, {"head_dim": 256, "value_dim": 256, "softcap": 5.0}, "softcap=5.0"),
        ((4, 2), (7, 0), {}, "this GPU: flash-attn 4 .*; nor this GPU: flash-attn 2"),
    ],
)
def test_refusals_say_why(install, versions, capability, arguments, words):
    install(capability, *versions)
    unsupported_reason = asked(**arguments)
    assert unsupported_reason is not None
    assert re.search(words, unsupported_reason), unsupported_reason


@pytest.mark.parametrize(("version", "capability"), GPUS)
@pytest.mark.parametrize(("d", "dv"), WIDTHS)
def test_every_shape_of_the_project_is_served(install, version, capability, d, dv):
    install(capability, version)
    assert asked(head_dim=d, value_dim=dv, softcap=30.0) is None


@pytest.mark.parametrize(
    ("version", "capability", "arguments"),
    [
        (4, AMPERE, {"needs_grad": False}),
        (4, GEFORCE, {"deterministic": False}),
        (4, BLACKWELL, {"head_dim": 256, "value_dim": 256}),
    ],
)
def test_what_is_served_all_the_same(install, version, capability, arguments):
    install(capability, version)
    assert asked(**arguments) is None


def test_a_call_that_cannot_be_served_raises_with_the_reason(install):
    install(HOPPER)
    q, k, v = inputs((1, 3), (1, 3), 2, 1, 1, 64, 64)
    with pytest.raises(ValueError, match="backend 'flash' cannot serve these tensors: no flash-attn is installed"):
        attend(q, k, v, softmax_scale=1.0)
    install(None, 2)
    with pytest.raises(ValueError, match="backend 'flash' cannot serve tensors on cpu"):
        attend(q, k, v, softmax_scale=1.0)


# The libraries themselves


@pytest.fixture(params=[4, 2])
def library(request, monkeypatch):
    """Only this generation, as it is installed."""
    pytest.importorskip(NAMES[request.param], reason=f"flash-attn {request.param} is not installed")
    missing = libraries.find()
    if request.param not in libraries.loaded:
        pytest.skip(f"flash-attn {request.param} does not load: {missing}")
    monkeypatch.setattr(libraries, "loaded", {request.param: libraries.loaded[request.param]})
    return request.param


@pytest.mark.gpu
def test_the_stand_ins_have_the_librarys_parameters(library):
    """Parameters passed by name exist in both; positions agree in both."""
    theirs, ours = libraries.loaded[library], StandIn(library, HOPPER).module()
    passed = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
    packing = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    for function, names in (
        (theirs.dense, passed),
        (ours.flash_attn_func, passed),
        (theirs.packed, passed | packing),
        (ours.flash_attn_varlen_func, passed | packing),
    ):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[:3] == ["q", "k", "v"]
        assert names <= set(parameters)


@pytest.mark.gpu
@pytest.mark.parametrize(("d", "dv"), WIDTHS)
@pytest.mark.parametrize(
    ("causal", "window", "sq", "sk"),
    [
        (False, (-1, -1), 300, 200),
        (True, (-1, -1), 257, 257),
        (True, (-1, -1), 300, 130),
        (True, (64, -1), 300, 300),
        (False, (10, 150), 300, 130),
    ],
)
def test_the_library_by_the_error_rule(library, d, dv, causal, window, sq, sk):
    options = {"causal": causal, "window_size": window}
    if asked(head_dim=d, value_dim=dv, device="cuda"):
        pytest.skip(f"flash-attn {library} cannot serve this on this GPU")
    q, k, v = inputs((2, sq), (2, sk), 4, 2, 2, d, dv)
    grad = torch.randn(2, sq, 4, dv, generator=torch.Generator().manual_seed(1)).cuda()

    def run(attend, dtype):
        ts = leaves(*(t.cuda() for t in (q, k, v)), dtype=dtype)
        out = attend(*ts)
        return [out, *gradients(out, ts, grad)]

    def in_plain_pytorch(q, k, v):
        k, v = (t.repeat_interleave(2, 2) for t in (k, v))
        visible = reference.attention_mask(sq, sk, causal=causal, window_size=window, device="cuda")
        logits = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.1).masked_fill(~visible, -torch.inf)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1).nan_to_num(), v)

    def ours(q, k, v):
        return attend(q, k, v, softmax_scale=0.1, **options)

    exact = run(in_plain_pytorch, torch.float64)
    for a, b, c in zip(run(ours, torch.bfloat16), run(in_plain_pytorch, torch.bfloat16), exact, strict=True):
        assert_error_rule(a, b, c)
    first, second = run(ours, torch.bfloat16), run(ours, torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_the_library_on_packed_documents(library):
    """Each document as if alone; empty ones and fully masked rows give 0."""
    if asked(head_dim=64, value_dim=128, device="cuda"):
        pytest.skip(f"flash-attn {library} cannot serve this on this GPU")
    queries, keys = [100, 0, 30, 200], [90, 40, 0, 120]
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device="cuda") for n in (queries, keys)
    )
    ts = inputs((330,), (250,), 4, 2, 2, 64, 128)
    q, k, v = leaves(*(t.cuda() for t in ts), dtype=torch.bfloat16)
    out = attend(q, k, v, (cu_q, cu_k, 200, 120), softmax_scale=0.125, causal=True)
    grads = gradients(out, [q, k, v], torch.ones_like(out))
    visible = reference.packed_attention_mask(cu_q, cu_k, 330, 250, causal=True)
    fully_masked = ~visible.any(-1)
    assert fully_masked.sum() == 10 + 30 + 80
    assert not any(t[fully_masked].any() for t in (out, grads[0]))
    assert not any(t[90:130].any() for t in grads[1:])
    assert all(torch.isfinite(g).all() for g in grads)
    alone = attend(q[None, :100], k[None, :90], v[None, :90], softmax_scale=0.125, causal=True)
    assert torch.equal(out[:100], alone[0])
