"""The transformers models that tests patch: real ratios of heads, small and random."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 61

_MOE: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
_WINDOWS: dict[str, Any] = {
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_hidden_layers": 3,
}

# Query:key/value heads of released models, which are divided by 4 here. Llama 3 8B, Qwen3 8B,
# Mistral 7B, Mixtral 8x7B, Ministral 8B, Granite 3 8B and Command R7B 32:8, Gemma 2 9B 16:8,
# Gemma 3 27B 32:16, EXAONE 4.0 32B and OLMo 2 32B 40:8, K-EXAONE 236B and Solar Open 100B 64:8,
# HyperCLOVA X SEED Think 14B 48:8, Phi-4-mini 24:8, Qwen2.5 7B 28:4, Qwen3 30B-A3B 32:4,
# SmolLM3 3B 16:4, Seed-OSS 36B 80:8, AFM 4.5B 20:4; latent: A.X-K1 64, A.X-K2 Light 32,
# DeepSeek-V3 128. GLM-4 9B and ERNIE 4.5 0.3B have half of the key/value heads here: 32:2, 16:2.
HEADS = {
    "llama": (32, 8),
    "qwen3": (32, 8),
    "gemma2": (16, 8),
    "exaone4": (40, 8),
    "exaone_moe": (64, 8),
    "solar_open": (64, 8),
    "axk1": (64, 64),
    "hyperclovax": (48, 8),
    "phi3": (24, 8),
    "qwen2": (28, 4),
    "gemma3_text": (32, 16),
    "qwen3_moe": (32, 4),
    "mistral": (32, 8),
    "mixtral": (32, 8),
    "ministral": (32, 8),
    "smollm3": (16, 4),
    "glm": (32, 4),
    "glm4": (32, 4),
    "granite": (32, 8),
    "cohere2": (32, 8),
    "seed_oss": (80, 8),
    "ernie4_5": (16, 4),
    "arcee": (20, 4),
    "olmo2": (40, 8),
    "axk2": (32, 32),
    "deepseek_v3": (128, 128),
}
RATIOS = dict.fromkeys(HEADS, 4) | {
    "gemma2": 2,
    "gemma3_text": 2,
    "exaone4": 5,
    "hyperclovax": 3,
    "phi3": 3,
    "qwen2": 7,
    "seed_oss": 5,
    "arcee": 5,
    "olmo2": 5,
}
"""The ratio that each test patches with: 4, or the nearest that fits."""

LATENT = {"axk1", "axk2", "deepseek_v3"}
"""Their attention cannot start as what it was."""

EXPERTS = {"exaone_moe", "solar_open", "qwen3_moe", "mixtral"} | LATENT
ONLY_EXPERTS = {"mixtral", "qwen3_moe"}
"""They have no other feed-forward blocks."""

QUICK = ("llama", "qwen3", "gemma2", "exaone4", "exaone_moe", "axk1", "phi3", "qwen2")
"""Those that `make test` runs; the others are slow."""


def families(names: Iterable[str] = tuple(HEADS)) -> list[Any]:
    """For pytest's parametrize."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


_LATENT: dict[str, Any] = {
    **_MOE,
    "n_routed_experts": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {**_WINDOWS, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0},
    "exaone4": {**_WINDOWS, "sliding_window_pattern": 2},
    "exaone_moe": {**_WINDOWS, **_MOE, "num_experts": 4, "first_k_dense_replace": 1},
    "solar_open": {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1},
    "axk1": _LATENT,
    "hyperclovax": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 0.8},
    "phi3": {"sliding_window": 6},
    "qwen2": {**_WINDOWS, "use_sliding_window": True},
    "gemma3_text": {
        **_WINDOWS,
        "query_pre_attn_scalar": 5,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 100.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
    "qwen3_moe": {**_MOE, "num_experts": 4},
    "mistral": {"sliding_window": 6},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "ministral": _WINDOWS,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 0.8},
    "cohere2": {**_WINDOWS, "logit_scale": 1.0},
    "seed_oss": {"attention_bias": True, "residual_dropout": 0.0},
    "arcee": {"hidden_size": 60},
    "axk2": {**_LATENT, "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2},
    "deepseek_v3": _LATENT,
}


def host_config(family: str, *, divisor: int = 4, **overrides: Any) -> Any:
    """A small config of a family; skips the test where transformers lacks it."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    heads, kv_heads = (n // divisor for n in HEADS[family])
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": max(48, 4 * heads),
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,  # large, so that attention and logits are far from uniform
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        "attention_dropout": 0.0,
    }
    if family not in LATENT:  # whose configs work it out
        common["head_dim"] = 8
    return AutoConfig.for_model(family, **(common | _OWN.get(family, {}) | overrides))


def host_model(family: str, **overrides: Any) -> Any:
    """A random model of a family, in evaluation mode."""
    config = host_config(family, **overrides)
    torch.manual_seed(0)
    return uneven(AutoModelForCausalLM.from_config(config).eval())


def uneven(model: Any) -> Any:
    """A random model with norms and biases that are not all alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def moved(model: Any) -> Any:
    """A patched model with its new parameters away from where they start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search("q_proj|query|noise|lambda|subln", name):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def token_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    """Ids without 0, which pads."""
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def left_padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts of different lengths as one batch."""
    longest = max(len(p) for p in prompts)
    ids = torch.stack([torch.nn.functional.pad(p, (longest - len(p), 0)) for p in prompts])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}
