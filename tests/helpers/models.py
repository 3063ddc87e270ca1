"""Motif models of every variant, small enough to build in milliseconds."""

from typing import Any

import torch

from motifarch.models.motif import MotifConfig, MotifForCausalLM

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_noise_heads": 2,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Large, so that attention and logits are far from uniform.
    "initializer_range": 0.3,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gda": {},
    "gda 4:1": {"num_attention_heads": 10, "num_key_value_heads": 2},
    "diff_v1": {"attention_type": "diff_v1", "num_attention_heads": 4, "num_noise_heads": None},
    "diff_v2": {"attention_type": "diff_v2", "num_attention_heads": 4, "num_noise_heads": None}
    | {"num_key_value_heads": 2},
    "diff_v2 gated": {"attention_type": "diff_v2", "num_key_value_heads": 1, "attention_gate": True},
    "softmax": {"attention_type": "softmax", "num_key_value_heads": 2, "hidden_act": "silu"},
    "gda window": {"sliding_window": 7, "use_sliding_window": True},
    "diff_v2 window": {"attention_type": "diff_v2", "num_key_value_heads": 2}
    | {"sliding_window": 4, "use_sliding_window": True},
    "gda narrow": {"num_key_value_heads": 2, "paired_kv": False, "sub_norm": False, "lambda_init": 0.3},
    "gda tied": {"tie_word_embeddings": True, "qk_norm": True},
}


def tiny_config(variant: str = "gda", **overrides: Any) -> MotifConfig:
    return MotifConfig(**(_COMMON | VARIANTS[variant] | overrides))


def tiny_model(
    variant: str = "gda", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> MotifForCausalLM:
    """A model in evaluation mode, with weights from its own initialisation."""
    torch.manual_seed(seed)
    return MotifForCausalLM(tiny_config(variant, **overrides)).to(dtype).eval()


def random_ids(*shape: int, seed: int = 1, vocab_size: int = 97) -> torch.Tensor:
    """Token ids without 0, which tests use for padding."""
    return torch.randint(1, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def packed(documents: list[torch.Tensor]) -> dict[str, Any]:
    """Documents as one row, with bounds and positions that restart (without labels)."""
    lengths = torch.tensor([len(d) for d in documents])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return {
        "input_ids": torch.cat(documents)[None],
        "position_ids": torch.cat([torch.arange(int(n)) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
