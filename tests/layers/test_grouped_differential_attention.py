"""GDA and DIFF V1 against the formula, transformers' DiffLlama and timm's DiffAttention."""

import math

import pytest
import torch
from transformers import DiffLlamaConfig, DynamicCache, LlamaConfig
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention

from helpers import timm_diff_attention
from helpers.agreement import assert_agrees, randomise
from helpers.plain_attention import attend, rms_norm, rotate
from motif_kernels import diff_attn_func
from motifarch.layers import (
    DifferentialAttention,
    GroupedDifferentialAttention,
    RotaryEmbedding,
    SoftmaxAttention,
    default_lambda_init,
)

EMBED, D = 24, 8


def gda(heads, noise_heads, kv_heads, *, layer_idx=0, **options):
    sizes = {"num_heads": heads, "num_noise_heads": noise_heads, "num_kv_heads": kv_heads, "head_dim": D}
    return GroupedDifferentialAttention(EMBED, **sizes, layer_idx=layer_idx, **options)


def plain_gda(layer, x, *, lambda_init, sub_norm=True, qk_norm=False, window=None, scale=D**-0.5):
    """One row x (S, E): blocks of g signal heads and a noise head, pairs of key heads, values of
    double width.

    Without pairs a key head serves signal and noise, and values are of single width.
    """
    keys = 2 if layer.paired_kv else 1  # of a pair
    blocks, pairs = layer.num_noise_heads, layer.num_kv_heads // keys
    q = (x @ layer.q_proj.weight.T).split(D, dim=-1)
    k = (x @ layer.k_proj.weight.T).split(D, dim=-1)
    v = (x @ layer.v_proj.weight.T).split(keys * D, dim=-1)
    if qk_norm:
        q = [rms_norm(t, layer.q_norm.weight, 1e-6) for t in q]
        k = [rms_norm(t, layer.k_norm.weight, 1e-6) for t in k]
    q, k = [rotate(t) for t in q], [rotate(t) for t in k]
    lam = math.exp(layer.lambda_q1.dot(layer.lambda_k1)) - math.exp(layer.lambda_q2.dot(layer.lambda_k2)) + lambda_init
    size = len(q) // blocks
    heads = []
    for n in range(blocks):
        pair = n // (blocks // pairs)
        noise = attend(q[n * size + size - 1], k[keys * pair + keys - 1], v[pair], scale=scale, window=window)
        for j in range(size - 1):
            signal = attend(q[n * size + j], k[keys * pair], v[pair], scale=scale, window=window)
            out = signal - lam * noise
            if sub_norm:
                out = (1 - lambda_init) * rms_norm(out, layer.subln.weight, 1e-5)
            heads.append(out)
    return torch.cat(heads, dim=-1) @ layer.o_proj.weight.T


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("kv_heads", "paired"), [(2, True), (4, True), (1, False), (2, False)])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 7])
def test_every_head_ratio_is_the_formula(ratio, kv_heads, paired, backend):
    layer = gda(2 * (ratio + 1), 2, kv_heads, paired_kv=paired, layer_idx=2, backend=backend, dtype=torch.float64)
    randomise(layer)
    x = torch.randn(2, 7, EMBED, dtype=torch.float64)
    ours = layer(x, RotaryEmbedding(D)(torch.arange(7)[None], torch.float64))
    with torch.no_grad():
        plain = torch.stack([plain_gda(layer, row, lambda_init=0.8 - 0.6 * math.exp(-0.6)) for row in x])
    assert_agrees(ours, plain, 1e-10)


@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "narrow"])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(
    ("options", "plain_options"),
    [
        ({"window_size": (2, 0)}, {"window": 3}),
        ({"qk_norm": True}, {"qk_norm": True}),
        ({"sub_norm": False}, {"sub_norm": False}),
        ({"softmax_scale": 0.7}, {"scale": 0.7}),
        ({"lambda_init": -0.0099}, {"lambda_init": -0.0099}),
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_are_the_formula_s(options, plain_options, backend, paired):
    layer = gda(6, 2, 4 if paired else 2, paired_kv=paired, backend=backend, dtype=torch.float64, **options)
    randomise(layer)
    x = torch.randn(1, 9, EMBED, dtype=torch.float64)
    ours = layer(x, RotaryEmbedding(D)(torch.arange(9)[None], torch.float64))
    with torch.no_grad():
        plain = plain_gda(layer, x[0], **({"lambda_init": 0.8 - 0.6} | plain_options))
    assert_agrees(ours[0], plain, 1e-10)


def test_positions_are_left_out_without_tables():
    layer = gda(3, 1, 2, window_size=(-1, 0))
    x = torch.randn(1, 6, EMBED)
    # Without positions, the last token cannot tell the order of those before it.
    assert_agrees(layer(x)[:, -1], layer(x[:, [3, 0, 4, 2, 1, 5]])[:, -1])


def interleave(weight, heads):
    """Rows of halves (all signal heads, then all noise heads) as adjacent pairs."""
    return weight.unflatten(0, (2, heads // 2, -1)).transpose(0, 1).flatten(0, 2)


@pytest.mark.parametrize("kv_heads", [8, 4, 2])
def test_diff_v1_agrees_with_diffllama(kv_heads):
    """Transformers keeps signal heads first and has no sub-norm weight.

    In float64, where its softmax is too if torch's attention computes it: lambda's gradient is one
    sum over all heads and tokens, whose terms cancel.
    """
    heads, depth = 8, 3
    sizes = {"hidden_size": EMBED, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": D}
    config = DiffLlamaConfig(**sizes, rms_norm_eps=1e-5, attn_implementation="sdpa")
    theirs = DiffLlamaAttention(config, layer_idx=depth).double()
    randomise(theirs)
    ours = DifferentialAttention(EMBED, num_heads=heads, num_kv_heads=kv_heads, head_dim=D, layer_idx=depth).double()
    sizes = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
    copied = {
        name: interleave(p, sizes[name.split(".")[0]]) if name.split(".")[0] in sizes else p
        for name, p in theirs.state_dict().items()
    }
    ours.load_state_dict(copied | {"subln.weight": torch.ones(2 * D)})

    x1 = torch.randn(2, 17, EMBED, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    tables = DiffLlamaRotaryEmbedding(config)(x1, torch.arange(17)[None])
    mask = torch.full((17, 17), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    out1, out2 = ours(x1, tables), theirs(x2, tables, mask)[0]
    assert_agrees(out1, out2)
    grad = torch.randn_like(out1)
    out1.backward(grad)
    out2.backward(grad)
    assert_agrees(x1.grad, x2.grad)
    named = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        kind = name.split(".")[0]
        assert_agrees(named[name].grad, interleave(p.grad, sizes[kind]) if kind in sizes else p.grad, name=name)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize(("ratio", "kv_heads"), [(1, 4), (2, 2), (4, 1), (2, 1)])
def test_without_pairs_and_lambda_it_is_softmax_attention(ratio, kv_heads, backend, qk_norm):
    """Signal heads as Llama's: output, cache and gradients; lambda's is its own."""
    heads = 4
    noise = heads // ratio
    options = {"qk_norm": qk_norm, "backend": backend}
    ours = gda(heads + noise, noise, kv_heads, paired_kv=False, sub_norm=False, lambda_init=0.0, **options)
    if qk_norm:
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": D, "layer_idx": 0}
        theirs = SoftmaxAttention(EMBED, **sizes, **options)
    else:
        config = LlamaConfig(hidden_size=EMBED, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=D)
        config._attn_implementation = "eager"
        theirs = LlamaAttention(config, layer_idx=0)
    randomise(theirs)
    queries = theirs.q_proj.weight.detach().view(noise, ratio * D, EMBED)
    with torch.no_grad():
        ours.load_state_dict(
            theirs.state_dict()
            | {"q_proj.weight": torch.cat([queries, torch.randn(noise, D, EMBED)], dim=1).flatten(0, 1)}
            | {"lambda_q1": torch.zeros(D), "lambda_q2": torch.zeros(D)}
            | {name: getattr(ours, name) for name in ("lambda_k1", "lambda_k2")}
        )
    x1 = torch.randn(2, 13, EMBED, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    tables = RotaryEmbedding(D)(torch.arange(13)[None])
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    out1, out2 = ours(x1, tables), theirs(x2, tables) if qk_norm else theirs(x2, tables, mask)[0]
    assert_agrees(out1, out2)
    grad = torch.randn(out1.shape)
    out1.backward(grad)
    out2.backward(grad)
    assert_agrees(x1.grad, x2.grad)
    for name in ("k_proj", "v_proj", "o_proj"):
        assert_agrees(getattr(ours, name).weight.grad, getattr(theirs, name).weight.grad, name=name)
    signal = ours.q_proj.weight.grad.view(noise, ratio + 1, D, EMBED)[:, :ratio]
    assert_agrees(signal.flatten(0, 2), theirs.q_proj.weight.grad)
    # Lambda leaves 0 with the first step: its gradient is not 0, nor is that of the vectors that
    # are.
    assert ours.lambda_q1.grad.norm() > 1e-3
    assert ours.lambda_q2.grad.norm() > 1e-3

    with torch.no_grad():
        cache = DynamicCache()
        parts = [
            ours(part, tuple(t[:, list(where)] for t in tables), past_key_values=cache)
            for part, where in zip(x1.split([9, 1, 3], dim=1), (range(9), [9], range(10, 13)), strict=True)
        ]
    assert_agrees(torch.cat(parts, dim=1), out2)
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == (2, kv_heads, 13, D)


needs_timm = pytest.mark.skipif(not timm_diff_attention.is_installed(), reason="timm is not installed")
TIMM_HEADS = 3


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def theirs(request):
    """Timm's layer: adjacent pairs of heads, values of double width, no rotation."""
    layer = timm_diff_attention.import_diff_attention()(
        TIMM_HEADS * 2 * D, num_heads=TIMM_HEADS, depth=4, proj_bias=False
    )
    layer.fused_attn = request.param
    randomise(layer)
    return layer.double()  # in float32 two orders of one sum differ by more on some processors


@needs_timm
def test_diff_v1_agrees_with_timm(theirs):
    embed = TIMM_HEADS * 2 * D
    ours = DifferentialAttention(
        embed, num_heads=2 * TIMM_HEADS, num_kv_heads=2 * TIMM_HEADS, head_dim=D, layer_idx=4, norm_eps=1e-5
    ).double()
    q, k, v = theirs.qkv.weight.detach().chunk(3)
    lambdas = {n: getattr(theirs, n).detach() for n in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")}
    outside = {"o_proj.weight": theirs.proj.weight.detach(), "subln.weight": theirs.sub_norm.weight.detach()}
    ours.load_state_dict(lambdas | {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v} | outside)
    x1 = torch.randn(2, 11, embed, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    out1, out2 = ours(x1), theirs(x2, is_causal=True)
    assert_agrees(out1, out2)
    grad = torch.randn(out1.shape, dtype=out1.dtype)
    out1.backward(grad)
    out2.backward(grad)
    assert_agrees(x1.grad, x2.grad)
    qkv = torch.cat([m.weight.grad for m in (ours.q_proj, ours.k_proj, ours.v_proj)])
    assert_agrees(qkv, theirs.qkv.weight.grad, name="qkv")
    assert_agrees(ours.o_proj.weight.grad, theirs.proj.weight.grad, name="proj")
    assert_agrees(ours.subln.weight.grad, theirs.sub_norm.weight.grad, name="sub_norm")
    for name in lambdas:
        assert_agrees(getattr(ours, name).grad, getattr(theirs, name).grad, name=name)


@needs_timm
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_bidirectional_attention_agrees_with_timm(theirs, backend):
    """Timm attends to all tokens: our function between its projections."""
    x1 = torch.randn(2, 11, TIMM_HEADS * 2 * D, dtype=torch.float64, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    q, k, v = theirs.qkv(x1).chunk(3, dim=-1)
    q, k = (t.unflatten(-1, (TIMM_HEADS, 2, D)) for t in (q, k))
    lam = (theirs.lambda_q1 @ theirs.lambda_k1).exp() - (theirs.lambda_q2 @ theirs.lambda_k2).exp()
    pairs = (t[..., i, :] for i in (0, 1) for t in (q, k))
    options = {"norm_weight": theirs.sub_norm.weight, "norm_eps": 1e-5, "out_scale": 1 - default_lambda_init(4)}
    v, lam = v.unflatten(-1, (TIMM_HEADS, 2 * D)), lam + default_lambda_init(4)
    out1 = diff_attn_func(*pairs, v, lam, **options, backend=backend)
    out1 = theirs.proj(out1.flatten(2))
    out2 = theirs(x2)
    assert_agrees(out1, out2)
    grad = torch.randn(out1.shape, dtype=out1.dtype)
    gradients = (torch.autograd.grad(out, [x, *theirs.parameters()], grad) for out, x in ((out1, x1), (out2, x2)))
    for a, b in zip(*gradients, strict=True):
        assert_agrees(a, b)


def test_lambda_starts_as_the_paper_says():
    assert [default_lambda_init(i) for i in (0, 3)] == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.9)])
    layer = DifferentialAttention(EMBED, num_heads=2, num_kv_heads=2, head_dim=4096, layer_idx=0, device="cpu")
    for vector in (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2):
        assert vector.std().item() == pytest.approx(0.1, rel=0.1)
    assert layer.compute_lambda().dtype == torch.float32


def test_lambda_stays_in_float32_in_a_bfloat16_layer():
    layer = DifferentialAttention(EMBED, num_heads=2, num_kv_heads=2, head_dim=D, layer_idx=0, dtype=torch.bfloat16)
    q1, k1, q2, k2 = (
        getattr(layer, f"lambda_{n}").detach().double().requires_grad_() for n in ("q1", "k1", "q2", "k2")
    )
    exact = (q1 @ k1).exp() - (q2 @ k2).exp() + 0.2
    assert layer.compute_lambda().item() == pytest.approx(exact.item(), abs=1e-6)
    out = layer(torch.randn(1, 5, EMBED, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert layer.last_lambda.item() == pytest.approx(exact.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((6, 4, 4), r"num_heads=6 .* num_noise_heads=4 .* multiple of num_noise_heads, at least twice"),
        ((4, 4, 4), r"num_heads=4 .* at least twice"),
        ((4, 0, 4), r"num_noise_heads=0"),
        ((6, 2, 3), r"num_kv_heads=3 must be even"),
        ((6, 2, 8), r"num_noise_heads=2 is not a multiple of the 4 key/value pairs that num_kv_heads=8 gives"),
    ],
)
def test_heads_that_do_not_divide_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        gda(*heads)


def test_diff_v1_refuses_an_odd_number_of_heads():
    with pytest.raises(ValueError, match="num_heads=5 must be even"):
        DifferentialAttention(EMBED, num_heads=5, num_kv_heads=2, head_dim=D, layer_idx=0)


def test_bounds_without_the_longest_document_are_refused():
    layer = DifferentialAttention(EMBED, num_heads=2, num_kv_heads=2, head_dim=D, layer_idx=0)
    with pytest.raises(ValueError, match="cu_seqlens was given without max_seqlen"):
        layer(torch.randn(1, 5, EMBED), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32))
