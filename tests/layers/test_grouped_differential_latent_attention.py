"""Latent attention: against transformers' DeepSeek-V3 without noise heads, and in each form that a
call can take.
"""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from motifarch.layers import GroupedDifferentialLatentAttention, RotaryEmbedding

SIZES: dict[str, Any] = {"head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": 20, "kv_lora_rank": 10}


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> GroupedDifferentialLatentAttention:
    torch.manual_seed(0)
    options = {"num_heads": 10, "ratio": 4, "layer_idx": 0} | SIZES | changes
    layer = GroupedDifferentialLatentAttention(32, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 + (parameter.ndim == 1))
    return layer.to(dtype)


def inputs(tokens: int = 11, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    x = torch.randn(2, tokens, 32, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return x, RotaryEmbedding(4)(torch.arange(tokens)[None], dtype)


def test_without_noise_heads_it_is_deepseeks_attention() -> None:
    layer = build(num_heads=6, ratio=None, num_noise_heads=0, gate=False, norm_eps=1e-6)
    config = DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=20,
        kv_lora_rank=10,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        rope_interleave=False,
        attn_implementation="eager",
    )
    theirs = DeepseekV3Attention(config, 0).double()
    names = {"wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj", "wkv_a": "kv_a_proj_with_mqa"}
    names |= {"kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj"}
    for ours, other in names.items():
        theirs.get_submodule(other).load_state_dict(layer.get_submodule(ours).state_dict())
    x, positions = inputs()
    hidden = torch.full((11, 11), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    expected, _ = theirs(x, positions, hidden)
    torch.testing.assert_close(layer(x, positions), expected, atol=1e-6, rtol=0)  # their norms are in float32


@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("window", [(-1, -1), (4, 0)])
def test_new_tokens_after_a_cache(ratio: int, window: tuple[int, int]) -> None:
    layer, (x, positions) = build(torch.float32, ratio=ratio, window_size=window), inputs(dtype=torch.float32)
    cache, out = DynamicCache(), []
    with torch.no_grad():
        for start, stop in ((0, 6), (6, 7), (7, 8), (8, 11)):
            part = tuple(t[:, start:stop] for t in positions)
            out.append(layer(x[:, start:stop], part, past_key_values=cache))
        torch.testing.assert_close(torch.cat(out, dim=1), layer(x, positions), atol=1e-5, rtol=0)
    held = sum(t.shape[1] * t.shape[3] for t in (cache.layers[0].keys, cache.layers[0].values))
    assert held == layer.cache_width == (14 if window == (-1, -1) else layer.num_kv_heads * 18)


class Scaled(nn.Module):
    """What an adapter or a quantised layer is like: it has another matrix than its inner weight."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner, self.in_features = inner, inner.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)


def test_the_up_projection_is_that_of_its_calls_in_every_form() -> None:
    layer, (x, positions) = build(torch.float32), inputs(dtype=torch.float32)
    layer.wkv_b = Scaled(layer.wkv_b)  # type: ignore[assignment]
    cache = DynamicCache()
    with torch.no_grad():
        layer(x[:, :10], tuple(t[:, :10] for t in positions), past_key_values=cache)
        last = layer(x[:, 10:], tuple(t[:, 10:] for t in positions), past_key_values=cache)
        torch.testing.assert_close(last, layer(x, positions)[:, 10:], atol=1e-5, rtol=0)


def test_maps_masks_and_a_context() -> None:
    layer, (x, positions) = build(), inputs()
    out, maps = layer(x, positions, output_attentions=True)
    torch.testing.assert_close(out, layer(x, positions), atol=1e-12, rtol=0)
    assert maps.shape == (2, 10, 11, 11)
    seen = torch.ones(11, 11, dtype=torch.bool).tril()
    torch.testing.assert_close(layer(x, positions, attn_mask=seen), out, atol=1e-12, rtol=0)
    context = torch.randn(2, 5, 32, dtype=x.dtype)
    assert layer(x, context=context).shape == x.shape
    assert not torch.equal(layer(x, context=context), layer(x, context=context.roll(1, 0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 12}, "qk_rope_head_dim=12 does not fit head_dim=12"),
        ({"qk_rope_head_dim": 14}, "qk_rope_head_dim=14 does not fit head_dim=12"),
        ({"qk_rope_head_dim": 3}, "even number from 2 to 11"),
        ({"num_kv_heads": 3}, "num_noise_heads=2 is not a multiple of the 3"),
        ({"num_heads": 9}, "num_heads=9"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)
