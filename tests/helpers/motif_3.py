"""Motif-3 at a size for float64 loops, with weights for which every part of it matters."""

from typing import Any

import torch

from motifarch.models.motif import MotifConfig, MotifForCausalLM

TINY: dict[str, Any] = {
    "model_type": "Motif",
    "attention_cls": "gdla",
    "diff_v2": True,
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 10,
    "num_noise_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "q_lora_rank": 24,
    "kv_lora_rank": 10,
    "elementwise_attn_output_gate": True,
    "hidden_act": "poly_norm",
    "polynorm_sigmoid_weight": True,
    "polynorm_output_scale": 0.5,
    "polynorm_bias_clamp": 0.5,
    "hidden_clamp": 1e6,
    "n_dense_first_layers": 1,
    "num_experts": 6,
    "experts_top_k": 2,
    "num_shared_experts": 1,
    "moe_intermediate_size": 16,
    "route_scale": 2.0,
    "mhc_enabled": True,
    "mhc_expansion_rate": 4,
    "use_sliding_window": True,
    "sliding_window": 5,
    "sliding_window_pattern": "interleave",
    "sliding_window_period": 4,
    "rope_theta": 10000.0,
    "swa_rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "rope_scaling": {"rope_type": "yarn", "factor": 64, "original_max_position_embeddings": 16, "beta_fast": 2}
    | {"beta_slow": 1, "mscale": 1, "apply_yarn_scaling": False},
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Fields as the released config has them."""


def tiny_motif_3(*, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> MotifForCausalLM:
    """A model in evaluation mode whose tensors are all drawn: no norm is 1, no bias 0."""
    model = MotifForCausalLM(MotifConfig(**(TINY | changes))).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            drawn = 1 + 0.3 * drawn
        elif tensor.ndim > 1:
            drawn *= 1.2 * tensor.shape[-1] ** -0.5
        elif "act_fn.bias" not in name:
            drawn *= 0.5
        with torch.no_grad():
            tensor.copy_(drawn)
    return model


def trained_motif_3(sequence_length: int | None = None) -> MotifForCausalLM:
    """One of three layers in training mode, whose experts' losses count."""
    model = tiny_motif_3(num_hidden_layers=3)
    for experts in model.model.expert_layers().values():
        experts.balance_loss_coeff, experts.magnitude_loss_coeff, experts.magnitude_threshold = 0.1, 0.1, 0.1
        experts.sequence_length = sequence_length
    return model.train()
