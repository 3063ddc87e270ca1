"""Dropout of attention's probabilities: its statistics, and when there is none."""

import pytest
import torch

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import DifferentialAttentionV2, GroupedDifferentialAttention, SoftmaxAttention

LAYERS = {
    "gda": (GroupedDifferentialAttention, {"num_heads": 8, "ratio": 3, "head_dim": 6, "sub_norm": False}),
    "v2": (DifferentialAttentionV2, {"num_heads": 8, "ratio": 3, "head_dim": 6}),
    "softmax": (SoftmaxAttention, {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6}),
}
TOKENS = 6


def make(kind, dropout=0.25, **options):
    layer_class, heads = LAYERS[kind]
    layer = layer_class(24, **heads, dropout=dropout, **options)
    randomise(layer)
    return layer


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_mean_of_many_draws_is_the_output_without_dropout(layer, backend):
    """The output is linear in the maps, and dropout keeps their mean."""
    layer, x = make(layer, backend=backend), torch.randn(1, TOKENS, 24)
    with torch.no_grad():
        drawn = torch.cat([layer(x.expand(500, -1, -1)) for _ in range(4)])
        expected = layer.eval()(x)[0]
    spread = drawn.std(dim=0) / len(drawn) ** 0.5
    assert (drawn.std(dim=0) > 1e-3).all()
    assert ((drawn.mean(dim=0) - expected).abs() < 5 * spread).all()
    assert torch.equal(layer(x), layer(x))  # in evaluation


def test_the_share_of_probabilities_left_out_is_that_asked_for():
    layer, x = make("gda", dropout=0.25), torch.randn(64, TOKENS, 24)
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    with torch.no_grad():
        _, maps = layer(x, output_attentions=True)
        _, whole = layer.eval()(x, output_attentions=True)
    kept = maps[..., causal] > 0
    assert_agrees(maps[..., causal][kept], whole[..., causal][kept] / 0.75, 1e-5)
    # For each head, signal or noise, on its own: 64 rows of 21 probabilities.
    share = 1 - kept.float().mean(dim=(0, 2))
    assert ((share - 0.25).abs() < 5 * (0.25 * 0.75 / (64 * 21)) ** 0.5).all()


def test_causality_packing_padding_and_contexts_hold_under_dropout():
    layer, x = make("gda"), torch.randn(2, TOKENS, 24)
    changed = x.clone()
    changed[:, 4:] = 0

    def draw(tokens, **arguments):
        torch.manual_seed(1)
        return layer(tokens, **arguments)

    assert_agrees(draw(x)[:, :4], draw(changed)[:, :4])
    real = torch.arange(TOKENS) < torch.tensor([[4], [4]])
    assert_agrees(draw(x, padding=real)[:, :4], draw(changed, padding=real)[:, :4])
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    packed = [draw(t.view(1, 12, 24), cu_seqlens=bounds, max_seqlen=8) for t in (x, changed)]
    assert_agrees(packed[0][:, :4], packed[1][:, :4])
    contexts = [draw(x, context=t, padding=real) for t in (x, changed)]
    assert_agrees(*contexts)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(dropout):
    with pytest.raises(ValueError, match="dropout="):
        make("gda", dropout=dropout)
