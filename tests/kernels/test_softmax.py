"""Softmax attention: differential attention without noise, by every backend and kernel."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.interpreter import require_interpreter, small_tiles
from helpers.numerics import assert_error_rule, gradients, leaves
from motif_kernels import (
    diff_attn_func,
    flops,
    softmax_attn_func,
    softmax_attn_varlen_func,
    softmax_attn_with_kvcache,
)
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences

OPTIONS = AttentionOptions(softmax_scale=0.25, left=-1, right=0, norm_eps=1e-5, out_scale=0.8, deterministic=True)
BACKENDS = ["sdpa", "cpu", "reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=BACKENDS)
def place(request):
    """(backend, device): torch, the formula, interpreted kernels; kernels on a GPU."""
    if request.param == "cuda":
        yield "triton", "cuda"
        return
    if request.param == "triton":
        require_interpreter()
    with small_tiles():
        yield request.param, "cpu"


def make(device, dtype=torch.float32, *, batch=1, sq=40, sk=49, heads=4, kv=(2, 2), d=16, dv=16, seed=0):
    """Tensors q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (batch, sq, heads, d), (batch, sk, kv[0], d), (batch, sk, kv[1], dv)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]


def plain(q, k, v, *, causal=False, window_size=(-1, -1), **_):
    """As one writes it down, in the inputs' precision."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    ahead = torch.arange(k.shape[1])[None] - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    left, right = window_size
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    if causal or right >= 0:
        hidden |= ahead > (0 if causal else right)
    if left >= 0:
        hidden |= ahead < -left
    weights = logits.masked_fill(hidden.to(q.device), -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def run(function, tensors, grad, dtype=None, **options):
    tensors = leaves(*tensors, dtype=dtype)
    out = function(*tensors, **options)
    return [out, *gradients(out, tensors, grad)]


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (9, 3)},
    "causal window": {"causal": True, "window_size": (11, 0)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("d", "dv", "kv"), [(64, 64, (2, 2)), (64, 128, (1, 1)), (24, 40, (4, 4)), (16, 16, (4, 2))])
def test_error_rule(d, dv, kv, mask, dtype, place):
    """Forward and every gradient against float64 and plain PyTorch; grouped keys and values."""
    backend, device = place
    if (backend, device) == ("triton", "cpu") and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter is wrong in bfloat16")
    tensors = make(device, dtype, d=d, dv=dv, kv=kv)
    grad = torch.randn(1, 40, 4, dv, generator=torch.Generator().manual_seed(1)).to(device)
    ours = run(softmax_attn_func, tensors, grad, backend=backend, **MASKS[mask])
    at_precision, exact = (
        run(plain, tensors, grad, **MASKS[mask]),
        run(plain, tensors, grad, torch.float64, **MASKS[mask]),
    )
    for o, p, e in zip(ours, at_precision, exact, strict=True):
        assert_error_rule(o, p, e)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "options", [{"causal": True}, {"causal": True, "window_size": (6, 0)}, {"window_size": (3, 4)}]
)
def test_packed_documents_equal_each_alone(options, deterministic, place):
    """Empty documents, one token, more keys than queries and the other way round."""
    backend, device = place
    lengths_q, lengths_k = [5, 0, 40, 1, 33], [9, 3, 40, 1, 0]
    q, k, v = (t[0] for t in make(device, sq=sum(lengths_q), sk=sum(lengths_k), dv=32))
    bounds_q, bounds_k = ([0, *itertools.accumulate(n)] for n in (lengths_q, lengths_k))
    cu = [torch.tensor(b, dtype=torch.int32, device=device) for b in (bounds_q, bounds_k)]
    grad = torch.randn(len(q), 4, 32, generator=torch.Generator().manual_seed(1)).to(device)
    packed = partial(softmax_attn_varlen_func, backend=backend, deterministic=deterministic)
    together = run(lambda *t: packed(*t, *cu, 40, 40, **options), [q, k, v], grad)

    def alone(q, k, v):
        documents = zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_k), strict=True)
        return torch.cat(
            [plain(q[None, a:b], k[None, c:d], v[None, c:d], **options)[0] for (a, b), (c, d) in documents]
        )

    for o, e in zip(together, run(alone, [q, k, v], grad, torch.float64), strict=True):
        torch.testing.assert_close(o.double(), e, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0), (4, 2)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 3, 8)])
@pytest.mark.parametrize("new", [1, 4])
def test_new_tokens_after_a_cache(new, leftpad, window, is_paged, place):
    """One row holds fewer tokens than are asked for, and one nothing but padding before them."""
    backend, device = place
    lengths = [23, 3, 40]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, h, 8, generator=generator).to(device) for n, h in ((new, 4), (48, 2), (48, 2)))
    held = torch.tensor(lengths, dtype=torch.int32, device=device) - new
    caches, table = [k.clone(), v.clone()], None
    for b, length in enumerate(lengths):
        for cache in caches:
            cache[b, max(0, length - new) :] = 7.0  # what is appended, and what is never read
    if is_paged:
        table = torch.randperm(18, generator=generator).view(3, 6).int().to(device)
        caches = [
            torch.zeros_like(t.view(18, 8, 2, 8)).index_copy(0, table.flatten().long(), t.view(18, 8, 2, 8))
            for t in caches
        ]
    fresh = [
        torch.stack([t[b, n - new : n] for b, n in enumerate(lengths)]) if min(lengths) >= new else None for t in (k, v)
    ]
    if fresh[0] is None:  # a row that had less than none cannot be appended to
        caches, held, table = [k, v], held + new, None
    options = {"causal": window[1] <= 0, "window_size": window}
    out = softmax_attn_with_kvcache(
        q,
        *caches,
        held.clamp(min=0),
        k=fresh[0],
        v=fresh[1],
        cache_leftpad=torch.tensor(leftpad, dtype=torch.int32, device=device),
        block_table=table,
        backend=backend,
        **options,
    )
    for b, (end, begin) in enumerate(zip(lengths, leftpad, strict=True)):
        expected = plain(q[b : b + 1], k[b : b + 1, begin:end], v[b : b + 1, begin:end], **options)
        torch.testing.assert_close(out[b : b + 1], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_splits", [None, 1, 3])
@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_decoding_in_parts_with_an_epilogue(softcap, num_splits, place):
    backend, device = place
    q, k, v = make(device, batch=3, sq=2, sk=48, dv=32)
    options = {"causal": True, "norm_weight": torch.rand(32, device=device), "out_scale": 0.7, "softcap": softcap}
    lengths = torch.tensor([48, 2, 31], dtype=torch.int32, device=device)
    run = partial(softmax_attn_with_kvcache, q, k, v, lengths, **options)
    torch.testing.assert_close(
        run(backend=backend, num_splits=num_splits), run(backend="reference"), atol=5e-6, rtol=1e-5
    )


@pytest.mark.parametrize("epilogue", ["norm_weight", "gate"])
def test_epilogues(epilogue, place):
    """They need no noise: gated softmax attention, say."""
    backend, device = place
    tensors = make(device, dv=32)
    extra = torch.rand(32 if epilogue == "norm_weight" else (1, 40, 4, 32), generator=torch.Generator().manual_seed(2))
    grad = torch.randn(1, 40, 4, 32, generator=torch.Generator().manual_seed(1)).to(device)
    results = []
    for name in (backend, "reference"):

        def attend(q, k, v, extra, name=name):
            return softmax_attn_func(q, k, v, causal=True, out_scale=0.6, backend=name, **{epilogue: extra})

        results.append(run(attend, [*tensors, extra.to(device)], grad))
    for o, e in zip(*results, strict=True):
        torch.testing.assert_close(o, e, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize("place", ["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_largest_logits_and_softcap(place):
    backend, device = place
    q, k, v = make(device, batch=2)
    options = {"causal": True, "window_size": (20, 0), "return_max_logits": True, "backend": backend}
    out, largest = softmax_attn_func(q, k, v, **options)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2)) * 0.25
    ahead = torch.arange(49)[None] - torch.arange(40)[:, None] - 9
    expected = logits.masked_fill(((ahead > 0) | (ahead < -20)).to(device), -torch.inf).amax((0, 2, 3))
    torch.testing.assert_close(largest, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out, plain(q, k, v, causal=True, window_size=(20, 0)), atol=1e-5, rtol=1e-5)
    _, capped = softmax_attn_func(q, k, v, softcap=1.0, **options)
    torch.testing.assert_close(capped, torch.tanh(expected), atol=1e-5, rtol=1e-5)


def test_it_is_differential_attention_at_lambda_0(place):
    backend, device = place
    q, k, v = make(device)
    torch.testing.assert_close(
        softmax_attn_func(q, k, v, causal=True, backend=backend),
        diff_attn_func(q, k, q, k, v.repeat_interleave(2, 2)[:, :, ::2], 0.0, causal=True, backend=backend),
        atol=1e-6,
        rtol=1e-5,
    )


def test_the_kernels_take_as_many_operations_as_the_mathematics(place):
    backend, device = place
    tensors = leaves(*make(device, sq=32, sk=32, dv=16))
    with FlopCounterMode(display=False) as counter:
        out = softmax_attn_func(*tensors, causal=True, backend=backend)
        forward = counter.get_total_flops()
        out.sum().backward()
    if backend != "reference":  # which computes masked pairs too
        pairs = flops.visible_pairs(32, 32, causal=True)
        assert forward == flops.attention_flops(pairs, 4, 16, 16)
        assert counter.get_total_flops() - forward == flops.attention_backward_flops(pairs, 4, 16, 16)


@pytest.mark.parametrize("place", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("packed", [False, True])
def test_operator_contract(packed, place):
    device = place[1]
    q, k, v = make(device, sq=9, sk=9)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32, device=device) if packed else None
    tensors = leaves(*([t[0] for t in (q, k, v)] if packed else (q, k, v)))
    inputs = AttentionInputs(tensors[0], tensors[1], None, None, tensors[2], None)
    torch.library.opcheck(
        torch.ops.motif.diff_attention.default, (*inputs, *Sequences(9, 9, bounds, bounds), *OPTIONS, True)
    )


def test_compiles_without_a_graph_break(place):
    backend, device = place
    tensors = leaves(*make(device, sq=30, sk=30))
    bounds = torch.tensor([0, 12, 30], dtype=torch.int32, device=device)

    def function(q, k, v):
        dense = softmax_attn_func(q, k, v, causal=True, backend=backend)
        flat = (t[0] for t in (q, k, v))
        return dense[0] + softmax_attn_varlen_func(*flat, bounds, bounds, 18, 18, causal=True, backend=backend)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager, traced = function(*tensors), compiled(*tensors)
    torch.testing.assert_close(traced, eager)
    for a, b in zip(gradients(traced, tensors, eager.detach()), gradients(eager, tensors, eager.detach()), strict=True):
        torch.testing.assert_close(a, b)


def test_noise_comes_whole_or_not_at_all():
    q, k, v = make("cpu")
    with pytest.raises(ValueError, match=r"q2 given without k2, lam: .* softmax attention none of them"):
        diff_attn_func(q, k, q, None, v, None)
    with pytest.raises(ValueError, match="lam given without q2, k2"):
        diff_attn_func(q, k, None, None, v, 0.3)
    lengths = torch.tensor([3], dtype=torch.int32)
    with pytest.raises(ValueError, match="k given without v: k and v must be given together"):
        softmax_attn_with_kvcache(q[:, :1], k, v, lengths, k=k[:, :1])


def test_refuses_with_a_reason():
    q, k, v = make("cpu")
    with pytest.raises(ValueError, match="q has 4 heads and k has 3; q's must be a multiple of k's"):
        softmax_attn_func(q, k[:, :, :1].expand(-1, -1, 3, -1), v)
    with pytest.raises(ValueError, match="backend 'fast' is not one of"):
        softmax_attn_func(q, k, v, backend="fast")
