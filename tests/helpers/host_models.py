"""The transformers models that tests patch: real ratios of heads, small and random."""

import re
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

# The released models' heads (query:key/value), divided by 4 here: Llama 3 8B and Qwen3 8B 32:8,
# Gemma 2 9B 16:8, EXAONE 4.0 32B 40:8, K-EXAONE 236B and Solar Open 100B 64:8, HyperCLOVA X SEED
# Think 14B 48:8; A.X-K1 64, latent.
HEADS = {
    "llama": (32, 8),
    "qwen3": (32, 8),
    "gemma2": (16, 8),
    "exaone4": (40, 8),
    "exaone_moe": (64, 8),
    "solar_open": (64, 8),
    "axk1": (64, 64),
    "hyperclovax": (48, 8),
}
RATIOS = dict.fromkeys(HEADS, 4) | {"gemma2": 2, "exaone4": 5, "hyperclovax": 3}
"""The ratio that each test patches with: 4, or the nearest that fits."""

EXPERTS = {"exaone_moe", "solar_open", "axk1"}

_OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {**_WINDOWS, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0},
    "exaone4": {**_WINDOWS, "sliding_window_pattern": 2},
    "exaone_moe": {**_WINDOWS, **_MOE, "num_experts": 4, "first_k_dense_replace": 1},
    "solar_open": {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1},
    "axk1": {
        **_MOE,
        "n_routed_experts": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
        "first_k_dense_replace": 1,
    },
    "hyperclovax": {"attention_multiplier": 0.5, "residual_multiplier": 0.7, "logits_scaling": 0.8},
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
    if family != "axk1":  # whose config works it out
        common["head_dim"] = 8
    return AutoConfig.for_model(family, **(common | _OWN.get(family, {}) | overrides))


def host_model(family: str, **overrides: Any) -> Any:
    """A random model of a family, in evaluation mode."""
    config = host_config(family, **overrides)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # norms and biases that are not all alike
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def moved(model: Any) -> Any:
    """A patched model with its new parameters away from where they start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search("q_proj|noise|lambda|subln", name):
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
