"""Attention that is given for a call, in place of motif_kernels'."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import DifferentialAttentionV2, GroupedDifferentialAttention, SoftmaxAttention

LAYERS = {
    "gda": (GroupedDifferentialAttention, {"num_heads": 8, "ratio": 3, "head_dim": 6}),
    "gda unpaired": (GroupedDifferentialAttention, {"num_heads": 8, "ratio": 3, "head_dim": 6, "paired_kv": False}),
    "v2 gated": (DifferentialAttentionV2, {"num_heads": 8, "ratio": 3, "head_dim": 6, "gate": True}),
    "softmax": (SoftmaxAttention, {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6}),
}


def torch_attention(layer, q, k, v):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = layer.head_dim**-0.5
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True).transpose(1, 2)


def make(kind, **options):
    layer_class, heads = LAYERS[kind]
    layer = layer_class(24, **heads, dtype=torch.float64, **options)
    randomise(layer)
    return layer


@pytest.mark.parametrize("kind", LAYERS)
def test_one_call_of_all_heads_gives_the_layer(kind):
    layer, x = make(kind), torch.randn(2, 7, 24, dtype=torch.float64)
    assert_agrees(layer(x, attend=torch_attention), layer(x), 1e-12)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("context", {"context": torch.randn(2, 5, 24, dtype=torch.float64)}),
        ("padding", {"padding": torch.ones(2, 7, dtype=torch.bool)}),
        ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 7, 14], dtype=torch.int32), "max_seqlen": 7}),
        ("attn_mask", {"attn_mask": torch.ones(7, 7, dtype=torch.bool)}),
        ("output_attentions", {"output_attentions": True}),
    ],
)
def test_what_it_would_drop_is_refused(name, arguments):
    with pytest.raises(ValueError, match=f"{name}: not served"):
        make("gda")(torch.randn(2, 7, 24, dtype=torch.float64), attend=torch_attention, **arguments)


def test_dropout_is_refused_in_training_alone():
    layer, x = make("gda", dropout=0.1), torch.randn(2, 7, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="dropout: not served"):
        layer(x, attend=torch_attention)
    assert_agrees(layer.eval()(x, attend=torch_attention), layer(x), 1e-12)
