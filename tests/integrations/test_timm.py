"""The attention for timm's vision transformers, against timm's own and the formula."""

import pytest
import torch
from torch import nn

from helpers import timm_diff_attention
from helpers.agreement import assert_agrees, randomise
from motifarch.integrations.timm import Attention

pytestmark = pytest.mark.skipif(not timm_diff_attention.is_installed(), reason="timm is not installed")

DIM, HEADS, TOKENS = 24, 6, 7
OPTIONS = {
    "plain": {},
    "biases": {"qkv_bias": True, "proj_bias": False},
    "norms": {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "qkv_bias": True},
    "gate": {"gated": True, "attn_head_dim": 8, "dim_out": 10},
}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "bool": {"attn_mask": torch.rand(2, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.3},
    "floats": {"attn_mask": torch.randn(HEADS, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).double()},
}


def both(**options):
    """Timm's attention, and ours with its weights."""
    theirs = timm_diff_attention.import_attention()(DIM, num_heads=HEADS, **options, dtype=torch.float64)
    randomise(theirs)
    ours = Attention(DIM, num_heads=HEADS, **options, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS)
def test_with_timm_s_weights_it_starts_as_timm_s_attention(options, mask):
    ours, theirs = both(**OPTIONS[options])
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    assert_agrees(ours(x, **MASKS[mask]), theirs(x, **MASKS[mask]), 1e-12)


@pytest.mark.parametrize("mask", ["none", "floats"])
def test_noise_is_the_formula_s(mask):
    """Each three heads share a noise head, which has the first one's keys."""
    ours, _ = both(qkv_bias=True)
    randomise(ours)
    x = torch.randn(2, TOKENS, DIM, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (t.split(4, dim=-1) for t in ours.qkv(x).chunk(3, dim=-1))
        noise_q = ours.noise_queries.proj(x).split(4, dim=-1)
        bias = MASKS[mask].get("attn_mask", torch.zeros(HEADS, TOKENS, TOKENS, dtype=torch.float64))
        vectors = ours.attention.lambda_vectors
        lam = (vectors.lambda_q1 @ vectors.lambda_k1).exp() - (vectors.lambda_q2 @ vectors.lambda_k2).exp()
        assert abs(lam) > 0.01
        heads = []
        for h in range(HEADS):
            first = h // 3 * 3
            signal = (q[h] @ k[h].mT / 2 + bias[h]).softmax(-1)
            noise = (noise_q[h // 3] @ k[first].mT / 2 + bias[first]).softmax(-1)
            heads.append((signal - lam * noise) @ v[h])
        assert_agrees(ours(x, **MASKS[mask]), ours.proj(torch.cat(heads, dim=-1)), 1e-12)


def test_its_own_weights_load_as_they_are():
    ours, _ = both()
    randomise(ours)
    again = Attention(DIM, num_heads=HEADS, dtype=torch.float64)
    again.load_state_dict(ours.state_dict())
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64)
    assert torch.equal(ours(x), again(x))


@pytest.mark.parametrize("where", ["attn_drop", "proj_drop"])
def test_dropout_drops_in_training_and_keeps_the_mean(where):
    attention = Attention(DIM, num_heads=HEADS, **{where: 0.3})
    x = torch.randn(1, TOKENS, DIM)
    with torch.no_grad():
        drawn = attention(x.expand(1000, -1, -1))
        expected = attention.eval()(x)[0]
    spread = drawn.std(dim=0) / len(drawn) ** 0.5
    assert (spread > 0).all()
    assert ((drawn.mean(dim=0) - expected).abs() < 5 * spread).all()


def test_the_sub_norm_and_another_ratio_are_a_subclass():
    class Papers(Attention):
        ratio, lambda_init, sub_norm = 2, 0.8, True

    attention = Papers(DIM, num_heads=HEADS)
    assert "signal_heads=6, noise_heads=3" in repr(attention)
    attention(torch.randn(1, TOKENS, DIM)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in attention.parameters())


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({"num_heads": 8}, {}, "ratio=3 does not divide the 8 heads.*1, 2, 4, 8"),
        ({"num_prefix_tokens": 1, "qkv_fused": False}, {}, "num_prefix_tokens, qkv_fused.*AttentionRope"),
        ({"qk_norm": True}, {}, "norm_layer is None with qk_norm=True"),
        ({"num_heads": 9}, {}, "dim=24 is not a multiple of num_heads=9"),
        ({}, {"rope": torch.zeros(1)}, "rope"),
        ({}, {"attn_mask": torch.zeros(TOKENS, TOKENS), "is_causal": True}, "attn_mask and is_causal=True"),
    ],
)
def test_what_is_not_served_is_refused_by_name(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(DIM, **{"num_heads": HEADS, **options})(torch.zeros(1, TOKENS, DIM), **arguments)
