"""How many heads a layer has, from the short form of its arguments."""

import pytest
import torch
from transformers import DynamicCache

from motifarch.layers import (
    DifferentialAttention,
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    SoftmaxAttention,
)


def weights(layer):
    return sum(p.weight.numel() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("ratio", [2, 4])
def test_the_short_form_is_the_full_form(ratio, paired):
    torch.manual_seed(0)
    short = GroupedDifferentialAttention(64, num_heads=2 * (ratio + 1), ratio=ratio, paired_kv=paired)
    torch.manual_seed(0)
    heads = {"num_heads": 2 * (ratio + 1), "num_noise_heads": 2, "num_kv_heads": 4 if paired else 2}
    full = GroupedDifferentialAttention(64, **heads, head_dim=32 // ratio, layer_idx=0, paired_kv=paired)
    x = torch.randn(1, 5, 64)
    assert torch.equal(short(x), full(x))


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_weights_of_the_defaults_are_those_documented(ratio):
    layer = GroupedDifferentialAttention(64, num_heads=2 * (ratio + 1), ratio=ratio)
    assert weights(layer) == (3 + 5 / ratio) * 64**2


def test_one_to_one_has_softmax_attention_s_size():
    grouped = GroupedDifferentialAttention(64, num_heads=8, ratio=1)
    v1, softmax = DifferentialAttention(64, num_heads=8), SoftmaxAttention(64, num_heads=8)
    assert weights(grouped) == weights(v1) == weights(softmax) == 4 * 64**2
    assert (v1.num_noise_heads, v1.head_dim) == (4, 8)


def test_v2_doubles_the_queries_of_softmax_attention():
    layer = DifferentialAttentionV2(64, num_heads=16)
    assert weights(layer) == 5 * 64**2
    grouped = DifferentialAttentionV2(64, num_heads=10, ratio=4)
    assert (grouped.num_noise_heads, grouped.num_kv_heads, grouped.head_dim) == (2, 2, 8)
    assert layer(torch.randn(1, 3, 64)).shape == grouped(torch.randn(1, 3, 64)).shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 9, "ratio": 4}, r"num_heads=9 .*ratio \+ 1 = 5: the nearest are 5 and 10"),
        ({"num_heads": 3, "ratio": 4}, "the nearest is 5"),
        ({"num_heads": 10, "ratio": 0}, "ratio=0"),
        ({"num_heads": 10}, "ratio=None and num_noise_heads=None"),
        ({"num_heads": 10, "ratio": 4, "num_noise_heads": 2}, "give one of the two"),
        ({"num_heads": 15, "ratio": 4}, "hidden_size=64 is not a multiple of 12 heads.*give head_dim"),
    ],
)
def test_heads_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GroupedDifferentialAttention(64, **arguments)


def test_a_layer_without_a_position_takes_no_cache():
    layer = GroupedDifferentialAttention(64, num_heads=10, ratio=4)
    with pytest.raises(ValueError, match="layer_idx is None"):
        layer(torch.randn(1, 3, 64), past_key_values=DynamicCache())
