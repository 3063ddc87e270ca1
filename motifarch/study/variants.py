"""Heads of each variant at a size: what the attention's name, the ratio and the size's shared
counts come to.

Head width, noise heads and key/value heads stay, and signal heads are ratio x noise heads, so that
ratios differ in nothing but their signal heads. Softmax attention and DIFF V2, which have no noise
heads to keep, take the size's query heads: DIFF V2 twice as many over the same key/value heads, as
its authors ask.
"""

from typing import Any

from motifarch.study.grid import Match, SizeSpec, VariantSpec


def attention_type(variant: VariantSpec) -> str:
    """The model's name for a variant's attention."""
    return "softmax" if variant.attention.startswith("softmax") else variant.attention


def head_ratio(variant: VariantSpec) -> int | None:
    """Signal heads for each noise head; None for softmax attention."""
    if variant.attention == "gda":
        return variant.ratio
    return None if attention_type(variant) == "softmax" else 1


def model_fields(variant: VariantSpec, size: SizeSpec, match: Match, intermediate_size: int) -> dict[str, Any]:
    """Fields of a recipe's model section.

    Args:
        variant: attention and activation.
        size: what all variants share.
        match: with "kv_cache", softmax_mha has no more heads than the others have key/value heads.
        intermediate_size: width of the feed-forward block.
    """
    noise, kv = size.num_noise_heads, size.kv_heads
    mha = kv if match == "kv_cache" else size.query_heads
    heads: dict[str, tuple[int, int | None, int]] = {  # query heads, noise heads among them, key/value heads
        "softmax_mha": (mha, None, mha),
        "softmax_gqa": (size.query_heads, None, kv),
        "diff_v1": (2 * noise, noise, kv),
        "gda": (((variant.ratio or 1) + 1) * noise, noise, kv),
        "diff_v2": (2 * size.query_heads, size.query_heads, kv),
    }
    queries, noise_heads, key_values = heads[variant.attention]
    return {
        "attention_type": attention_type(variant),
        "hidden_act": variant.activation,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_hidden_layers,
        "head_dim": size.head_dim,
        "num_attention_heads": queries,
        "num_noise_heads": noise_heads,
        "num_key_value_heads": key_values,
        "intermediate_size": intermediate_size,
    }
