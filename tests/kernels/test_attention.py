"""Each backend against the specification: masks, packed documents, reasons."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import diff_attn_func, diff_attn_varlen_func, reference

CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_MAP = ["sdpa", "cpu"]
"""The backends of a CPU that hold no map."""
LAM = 6
"""Where lambda's gradient is among what :func:`run` gives."""


def make_inputs(
    *, batch=2, sq=37, sk=37, signal=4, noise=2, k1=2, k2=2, hv=2, d=8, dv=16, lam="head", epilogue="norm", seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    lam_shape = {"scalar": (), "head": (signal,), "token": (batch, sq, signal)}[lam]
    return {
        "q1": randn(batch, sq, signal, d),
        "k1": randn(batch, sk, k1, d),
        "q2": randn(batch, sq, noise, d),
        "k2": randn(batch, sk, k2, d),
        "v": randn(batch, sk, hv, dv),
        "lam": 0.5 + 0.1 * randn(*lam_shape),
        "norm_weight": 1 + 0.1 * randn(dv) if epilogue == "norm" else None,
        "gate": randn(batch, sq, signal, dv) if epilogue == "gate" else None,
    }


def run(inputs, *, dtype, backend, seed=1, **options):
    """Output and gradients; lambda and the norm weight stay in float32."""
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        name: leaves(t, dtype=kept if name in ("lam", "norm_weight") else dtype)[0] for name, t in inputs.items()
    }
    positional = [tensors[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")]
    epilogue = {n: tensors[n] for n in ("norm_weight", "gate")}
    out = diff_attn_func(*positional, **epilogue, backend=backend, **options)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    return [out, *gradients(out, list(tensors.values()), grad)]


def plain_attention(inputs, dtype, *, call_torch=False, **options):
    """The same mathematics in plain PyTorch at ``dtype``: probabilities and both outputs are
    rounded to it. ``call_torch`` takes torch's own attention with a mask for the softmax.
    """

    def softmax_attention(q, k, v, causal=False, window_size=(-1, -1)):
        k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        if call_torch:
            # At one width, as torch's blocked kernel wants it; a fully masked row is NaN or 0.
            scale, width = q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1])
            padded = [F.pad(t, (0, width - t.shape[-1])).transpose(1, 2) for t in (q, k, v)]
            mask = reference.attention_mask(q.shape[1], k.shape[1], causal=causal, window_size=window_size)
            out = F.scaled_dot_product_attention(*padded, attn_mask=None if mask.all() else mask, scale=scale)
            return torch.nan_to_num(out.transpose(1, 2)[..., : v.shape[-1]])
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5)
        visible = reference.attention_mask(q.shape[1], k.shape[1], causal=causal, window_size=window_size)
        logits = logits.masked_fill(~visible, -torch.inf)
        probabilities = torch.nan_to_num(logits.softmax(-1))
        return torch.einsum("bhqk,bkhd->bqhd", probabilities, v)

    t = dict(inputs)
    norm, out_scale = t.pop("norm_weight"), options.pop("out_scale", 1.0)
    o1, o2 = (
        softmax_attention(t["q1"], t["k1"], t["v"], **options),
        softmax_attention(t["q2"], t["k2"], t["v"], **options),
    )
    return reference.diff_combine(o1, o2, t["lam"], norm_weight=norm, gate=t["gate"], out_scale=out_scale).to(dtype)


def check(inputs, dtype, backend, **options):
    ours = run(inputs, dtype=dtype, backend=backend, **options)
    exact = run(inputs, dtype=torch.float64, backend="reference", **options)
    kept = {n: leaves(t, dtype=torch.float32 if n in ("lam", "norm_weight") else dtype)[0] for n, t in inputs.items()}

    def run_plain(**how):
        out = plain_attention(kept, dtype, **how, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        return [torch.nan_to_num(t) for t in (out, *gradients(out, list(kept.values()), grad))]

    plain = run_plain()
    if dtype == torch.float32 and backend != "reference":
        # On some processors torch's attention adds the rows of a key's gradient one by one, which
        # rounds more than the formula's matrix product: the plain mathematics is the worse of both.
        plain = [
            max(pair, key=lambda t, e=e: (t.double() - e).abs().max().item() if t.numel() else 0.0)
            for *pair, e in zip(plain, run_plain(call_torch=True), exact, strict=True)
        ]
    assert ours[0].dtype == dtype
    # In float32 both sides differ from the exact result by the order of their sums alone, and one
    # may be lucky: the floor is two units in the last place of the largest number in the problem.
    # In half precision the rule stands on its own.
    floor = None
    if dtype == torch.float32:
        largest = max(e.abs().max().item() for e in exact if e.numel())
        # Key and value gradients add a row for each query, a random walk of roundings.
        steps = max(1, inputs["q1"].shape[1] / 32)
        floor = 2 * torch.finfo(dtype).eps * largest * steps**0.5
    floors = [floor] * len(exact)
    if dtype == torch.float32 and inputs["lam"].ndim == 0:
        # The gradient of a scalar lambda is one sum over tokens and heads, and the plain error is
        # one number, small by luck at some seeds. A unit in the last place of each term bounds
        # both: over 250 seeds ours came to 0.53 of that, the plain mathematics to 0.75.
        of_each = inputs | {"lam": inputs["lam"].expand(inputs["q1"].shape[:3])}
        terms = run(of_each, dtype=torch.float64, backend="reference", **options)[LAM]
        floors[LAM] = torch.finfo(dtype).eps * terms.abs().sum().item()
    for o, p, e, floor in zip(ours, plain, exact, floors, strict=True):
        assert o.shape == e.shape
        assert_error_rule(o, p, e, precision=dtype, floor=floor)


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 3)},
    "left window": {"causal": True, "window_size": (7, 0)},
    "open left": {"window_size": (-1, 2)},
    "open right": {"window_size": (4, -1)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("backend", ["reference", *BY_MAP])
def test_masks_keep_the_error_rule(mask, dtype, backend):
    check(make_inputs(), dtype, backend, **MASKS[mask], out_scale=0.8)


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("lam", "epilogue"), [("scalar", "norm"), ("head", "none"), ("token", "gate")])
@pytest.mark.parametrize("backend", BY_MAP)
def test_ratios_lambdas_and_epilogues(ratio, lam, epilogue, backend):
    inputs = make_inputs(signal=2 * ratio, noise=2, lam=lam, epilogue=epilogue)
    check(inputs, torch.float32, backend, causal=True)


@pytest.mark.parametrize("heads", [(4, 2, 2), (1, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize(("d", "dv"), [(8, 8), (8, 16), (12, 8)])
@pytest.mark.parametrize("backend", BY_MAP)
def test_grouped_heads_and_widths(heads, d, dv, backend):
    for options in ({"causal": True}, {"causal": True, "window_size": (9, 0)}):
        check(make_inputs(k1=heads[0], k2=heads[1], hv=heads[2], d=d, dv=dv), torch.float32, backend, **options)


@pytest.mark.parametrize(("sq", "sk"), [(1, 300), (300, 1), (17, 300), (300, 17), (1, 1), (260, 260), (5, 0), (0, 5)])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", BY_MAP)
def test_different_lengths(sq, sk, mask, backend):
    check(make_inputs(batch=1, sq=sq, sk=sk), torch.float32, backend, **MASKS[mask])


@pytest.mark.parametrize("empty", [{"batch": 0}, {"dv": 0}])
def test_no_rows_and_no_width_give_what_there_is(empty):
    for backend in ("auto", "reference", *BY_MAP):
        inputs = make_inputs(**empty, epilogue="none")
        out, *grads = run(inputs, dtype=torch.float32, backend=backend, causal=True)
        assert out.shape == (*inputs["q1"].shape[:-1], inputs["v"].shape[-1])
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_key_that_is_not_seen_may_be_nan(backend):
    inputs = make_inputs(sq=70, sk=70, epilogue="none")
    for name in ("k1", "k2"):
        inputs[name][:, -1] = torch.nan
    out = diff_attn_func(**inputs, backend=backend, causal=True)
    assert torch.isfinite(out[:, :-1]).all()


def test_fully_masked_rows_are_zero_without_gradient():
    for backend in ("reference", *BY_MAP):
        inputs = make_inputs(sq=9, sk=4, epilogue="none")
        out, dq1, *rest = run(inputs, dtype=torch.float32, backend=backend, causal=True)
        assert (out[:, :5] == 0).all()
        assert (out[:, 5:] != 0).any()
        assert (dq1[:, :5] == 0).all()
        assert all(torch.isfinite(g).all() for g in rest)


def test_strided_views_are_taken_as_they_are():
    """q1 and q2 as slices of one projection, as the layers pass them."""
    torch.manual_seed(0)
    query = torch.randn(2, 21, 2, 5, 8, requires_grad=True)  # blocks of four signal heads and a noise head
    key = torch.randn(2, 21, 2, 2, 8)
    v = torch.randn(2, 21, 2, 16)
    results = []
    for backend in ("reference", *BY_MAP):
        q1, q2 = query[:, :, :, :4].flatten(2, 3), query[:, :, :, 4]
        out = diff_attn_func(q1, key[:, :, :, 0], q2, key[:, :, :, 1], v, 0.3, causal=True, backend=backend)
        results.append((out, torch.autograd.grad(out.sum(), query)[0]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    inputs = make_inputs(batch=1, sq=5, sk=6, d=3, dv=4, lam="token")
    tensors = leaves(*(t for t in inputs.values() if t is not None), dtype=torch.float64)

    def function(q1, k1, q2, k2, v, lam, norm_weight):
        return diff_attn_func(q1, k1, q2, k2, v, lam, norm_weight=norm_weight, causal=True, backend=backend)

    assert torch.autograd.gradcheck(function, tensors)


def test_softcap_and_max_logits():
    t = make_inputs(epilogue="none", lam="scalar")
    args = [t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")]
    out, max_signal, max_noise = diff_attn_func(*args, causal=True, return_max_logits=True)
    torch.testing.assert_close(out, diff_attn_func(*args, causal=True), atol=1e-5, rtol=1e-5)
    logits = torch.einsum("bqhd,bkhd->bhqk", t["q1"], t["k1"].repeat_interleave(2, 2)) * 8**-0.5
    visible = torch.ones(37, 37).tril().bool()
    torch.testing.assert_close(max_signal, logits.masked_fill(~visible, -torch.inf).amax((0, 2, 3)))
    assert max_noise.shape == (2,)
    _, capped, _ = diff_attn_func(*args, causal=True, return_max_logits=True, softcap=1.0)
    torch.testing.assert_close(capped, torch.tanh(max_signal))


# packed documents


def packed(lengths, **options):
    total = sum(lengths)
    inputs = make_inputs(batch=1, sq=total, sk=total, **options)
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return {n: t if t is None or n in ("norm_weight",) or t.ndim < 2 else t[0] for n, t in inputs.items()}, bounds


@pytest.mark.parametrize("lengths", [[37], [1, 1, 5, 30], [0, 20, 0, 0, 17, 0], [300, 3]])
@pytest.mark.parametrize("mask", ["causal", "full", "left window"])
@pytest.mark.parametrize("backend", ["reference", *BY_MAP])
def test_packed_documents_equal_each_alone(lengths, mask, backend):
    t, bounds = packed(lengths, lam="token")
    grads_together = leaves(*(t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam", "norm_weight")))
    *args, weight = grads_together
    out = diff_attn_varlen_func(
        *args, bounds, bounds, max(lengths), max(lengths), **MASKS[mask], norm_weight=weight, backend=backend
    )
    together = [out, *torch.autograd.grad(out.square().sum(), grads_together)]

    alone_inputs = leaves(*(t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam", "norm_weight")), dtype=torch.float64)
    *args, weight = alone_inputs
    outs = [
        diff_attn_func(*(a[None, s:e] for a in args), **MASKS[mask], norm_weight=weight, backend="reference")[0]
        for s, e in itertools.pairwise(bounds.tolist())
    ]
    alone = [torch.cat(outs), *torch.autograd.grad(torch.cat(outs).square().sum(), alone_inputs)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("mask", ["causal", "left window"])
@pytest.mark.parametrize("backend", ["reference", *BY_MAP])
def test_tokens_after_the_last_document_are_zero(mask, backend):
    t, bounds = packed([9, 140, 6], lam="token", epilogue="gate")
    bounds = bounds[:-1]
    names = ("q1", "k1", "q2", "k2", "v", "lam", "gate")
    whole, own = (leaves(*(t[n][:stop] for n in names)) for stop in (155, 149))
    results = []
    for *args, gate in (whole, own):
        options = {"gate": gate, "backend": backend, **MASKS[mask]}
        out = diff_attn_varlen_func(*args, bounds, bounds, 140, 140, **options)
        results.append([out, *torch.autograd.grad(out.cos().sum(), [*args, gate])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a[:149], b)
        assert (a[149:] == 0).all()


def test_packed_queries_shorter_than_keys():
    """A few new queries against longer key runs, as in cached generation."""
    t = make_inputs(batch=1, sq=6, sk=40, lam="scalar")
    cu_q, cu_k = torch.tensor([0, 1, 6], dtype=torch.int32), torch.tensor([0, 15, 40], dtype=torch.int32)
    args = [t[n][0] for n in ("q1", "k1", "q2", "k2", "v")]
    each = [
        diff_attn_varlen_func(*args, t["lam"], cu_q, cu_k, 5, 25, causal=True, backend=backend)
        for backend in ("reference", *BY_MAP)
    ]
    for out in each[1:]:
        torch.testing.assert_close(out, each[0])


def test_bounds_elsewhere_are_refused():
    t, bounds = packed([10, 12], lam="head")
    args = [t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")]
    with pytest.raises(ValueError, match="cu_seqlens_k is on meta and the packed tensors on cpu"):
        diff_attn_varlen_func(*args, bounds, bounds.to("meta"), 12, 12)


@pytest.mark.parametrize("backend", ["reference", *BY_MAP])
def test_packed_compiles_without_a_graph_break(backend):
    t, bounds = packed([10, 12], lam="head")
    args = leaves(*(t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")))

    def function(*a):
        return diff_attn_varlen_func(*a, bounds, bounds, 12, 12, causal=True, window_size=(5, 0), backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = function(*args), compiled(*args)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(torch.autograd.grad(traced.sum(), args), torch.autograd.grad(eager.sum(), args), strict=True):
        torch.testing.assert_close(a, b)


# reasons


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q2": torch.randn(2, 37, 3, 8)}, "q1 has 4 heads and q2 has 3"),
        ({"k1": torch.randn(2, 37, 3, 8)}, "q1 has 4 heads and k1 has 3"),
        ({"v": torch.randn(2, 37, 4, 16)}, "q2 has 2 heads and v has 4"),
        ({"k2": torch.randn(2, 37, 2, 9)}, "k2 has head_dim 9"),
        ({"v": torch.randn(2, 36, 2, 16)}, "differ only in heads and width"),
        ({"q1": torch.randn(2, 4, 8)}, r"it must be \(batch, seqlen, heads, headdim\)"),
        ({"lam": torch.ones(5)}, r"lam has shape \(5,\)"),
        ({"k1": torch.randn(2, 37, 2, 8).double()}, "k1 is torch.float64"),
        ({"k1": torch.randn(2, 37, 2, 8, device="meta")}, "k1 is on meta and q1 on cpu"),
        ({"lam": torch.ones(4, device="meta")}, "lam is on meta and q1 on cpu"),
        ({"k2": torch.randn(2, 37, 8, 2).transpose(2, 3)}, "k2 has stride 2 in its last dimension"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    t = make_inputs(epilogue="none") | change
    with pytest.raises((ValueError, TypeError), match=message):
        diff_attn_func(*(t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 37], "starts at 1"),
        ([0, 20, 10, 37], "falls after entry 1"),
        ([0, 38], "ends at 38 but the packed tensors hold 37"),
        ([0, 37], "a document of 37 tokens but the stated maximum is 30"),
    ],
)
def test_document_bounds_are_checked(bounds, message):
    t, good = packed([37], lam="scalar")
    args = [t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")]
    bad = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        diff_attn_varlen_func(*args, bad, good, 30, 37)
    with pytest.raises(TypeError, match="int32"):
        diff_attn_varlen_func(*args, good.long(), good, 37, 37)


def test_backends_that_cannot_serve_say_why():
    t = make_inputs(epilogue="none")
    args = [t[n] for n in ("q1", "k1", "q2", "k2", "v", "lam")]
    with pytest.raises(
        ValueError, match=r"'sdpa' cannot serve softcap=30.0: torch's scaled_dot_product_attention does not have it"
    ):
        diff_attn_func(*args, backend="sdpa", softcap=30.0)
    with pytest.raises(ValueError, match="'sdpa' cannot serve return_max_logits"):
        diff_attn_func(*args, backend="sdpa", return_max_logits=True)
    with pytest.raises(ValueError, match="'cudnn' is not one of 'auto', 'reference', 'sdpa'"):
        diff_attn_func(*args, backend="cudnn")
