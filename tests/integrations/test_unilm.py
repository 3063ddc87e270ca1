"""Layers with weights of microsoft/unilm's modules compute what those compute.

The modules need flash-attn and a GPU. Their formulas are written anew here, of parts that nobody
here wrote: torch's attention and RMSNorm, and the interleaved rotary embedding of GPT-J.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

from helpers.agreement import assert_agrees
from motifarch.integrations.unilm import attention_from_unilm, rotary_halves
from motifarch.layers import RotaryEmbedding

HIDDEN, HEADS, D, TOKENS, DEPTH = 48, 4, 6, 9, 2


def weights_v1(kv_heads):
    """Of MultiheadDiffAttn(48, DEPTH, 4, kv_heads)."""
    torch.manual_seed(0)
    sizes = {"q_proj": HIDDEN, "k_proj": 2 * kv_heads * D, "v_proj": 2 * kv_heads * D, "out_proj": HIDDEN}
    linear = {f"{name}.weight": torch.randn(rows, HIDDEN, dtype=torch.float64) * 0.3 for name, rows in sizes.items()}
    lambdas = {f"lambda_{name}": torch.randn(D, dtype=torch.float64) * 0.3 for name in ("q1", "k1", "q2", "k2")}
    return linear | lambdas | {"subln.weight": torch.rand(2 * D, dtype=torch.float64) + 0.5}


def weights_v2(kv_heads):
    """Of MultiheadFlashDiffV2(True, 48, 4, kv_heads, 6)."""
    torch.manual_seed(0)
    rows = {"q_proj": 2 * HEADS * D, "k_proj": kv_heads * D, "v_proj": kv_heads * D, "lambda_proj": HEADS}
    linear = {f"{name}.weight": torch.randn(n, HIDDEN, dtype=torch.float64) * 0.3 for name, n in rows.items()}
    return linear | {"o_proj.weight": torch.randn(HIDDEN, HEADS * D, dtype=torch.float64)}


def heads(weights, name, x, width):
    """(B, S, heads, width); queries and keys are rotated, neighbours together."""
    out = F.linear(x, weights[f"{name}.weight"]).unflatten(-1, (-1, width))
    if name == "v_proj":
        return out
    angles = torch.arange(TOKENS)[:, None] * 10_000.0 ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)
    return apply_rotary_pos_emb(out, angles.sin()[None], angles.cos()[None])


def attend(q, k, v):
    """Causal; heads that share a key or value head are neighbours."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def diff_v1(weights, x, *, naive):
    q, k = heads(weights, "q_proj", x, D), heads(weights, "k_proj", x, D)
    v = heads(weights, "v_proj", x, 2 * D)
    if naive:  # repeats keys, then tells signal from noise by the parity of all heads
        k, v = (t.repeat_interleave(HEADS // v.shape[2], dim=2) for t in (k, v))
    signal, noise = (attend(q[:, :, i::2], k[:, :, i::2], v) for i in (0, 1))
    first, second = (torch.exp(weights[f"lambda_q{i}"] @ weights[f"lambda_k{i}"]) for i in (1, 2))
    start = 0.8 - 0.6 * math.exp(-0.3 * DEPTH)
    out = signal - (first - second + start) * noise
    out = F.rms_norm(out, (2 * D,), weights["subln.weight"], 1e-5) * (1 - start)
    return F.linear(out.flatten(2), weights["out_proj.weight"])


def diff_v2(weights, x):
    out = attend(heads(weights, "q_proj", x, D), heads(weights, "k_proj", x, D), heads(weights, "v_proj", x, D))
    lam = torch.sigmoid(F.linear(x, weights["lambda_proj.weight"]))[..., None]
    return F.linear((out[:, :, 0::2] - lam * out[:, :, 1::2]).flatten(2), weights["o_proj.weight"])


def ours(weights, x, **options):
    layer = attention_from_unilm(weights, num_heads=HEADS, layer_idx=DEPTH, **options)
    return layer(x, RotaryEmbedding(D)(torch.arange(TOKENS)[None], torch.float64))


@pytest.mark.parametrize("naive", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_diff_v1_is_the_same_function(kv_heads, naive):
    weights, x = weights_v1(kv_heads), torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    theirs = diff_v1(weights, x, naive=naive)
    assert_agrees(ours(weights, x, num_kv_heads=kv_heads, naive=naive), theirs, 1e-10)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_diff_v2_is_the_same_function(kv_heads):
    weights, x = weights_v2(kv_heads), torch.randn(2, TOKENS, HIDDEN, dtype=torch.float64)
    assert_agrees(ours(weights, x, num_kv_heads=kv_heads), diff_v2(weights, x), 1e-10)


def test_lambdas_stay_float32_beside_bfloat16_projections():
    weights = {name: t.to(torch.float32 if "lambda" in name else torch.bfloat16) for name, t in weights_v1(4).items()}
    layer = attention_from_unilm(weights, num_heads=HEADS, layer_idx=DEPTH)
    assert layer.lambda_q1.dtype == torch.float32
    assert layer.q_proj.weight.dtype == torch.bfloat16
    layer(torch.randn(1, TOKENS, HIDDEN, dtype=torch.bfloat16)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_what_does_not_fit_is_named():
    weights = weights_v1(2)
    with pytest.raises(ValueError, match=r"k_proj\.weight has shape \(24, 48\)"):
        attention_from_unilm(weights, num_heads=HEADS, layer_idx=0)
    del weights["subln.weight"]
    with pytest.raises(ValueError, match=r"lack subln\.weight"):
        attention_from_unilm(weights, num_heads=HEADS, layer_idx=0, num_kv_heads=2)
    with pytest.raises(ValueError, match="head_dim=7"):
        rotary_halves(torch.zeros(14, 3), 7)
