"""The encoders that tests patch: small, random, and none of them causal."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
)

from helpers.host_models import VOCAB, token_ids, uneven

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
    "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}
_IMAGES: dict[str, Any] = _SIZES | {"image_size": 16, "patch_size": 4, "num_channels": 3}
_TEXT: dict[str, Any] = _SIZES | {"vocab_size": VOCAB, "pad_token_id": 0, "max_position_embeddings": 64}
_SOUNDS: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.15,
}

ENCODERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, _TEXT),
    "dinov2": (AutoModelForImageClassification, _IMAGES),
    "modernbert": (
        AutoModelForMaskedLM,
        _TEXT
        | {"layer_types": ["sliding_attention", "full_attention"], "local_attention": 6, "initializer_range": 0.3},
    ),
    "siglip_vision_model": (AutoModel, _IMAGES),
    "vit": (AutoModelForImageClassification, _IMAGES),
    "whisper": (AutoModelForAudioClassification, _SOUNDS),
}
"""The class that makes each, and its config's values."""

TEXT = ("bert", "modernbert")


def encoder(family: str) -> Any:
    """A random model of a family, in evaluation mode."""
    auto, values = ENCODERS[family]
    torch.manual_seed(0)
    return uneven(auto.from_config(AutoConfig.for_model(family, **values)).eval())


def inputs_of(family: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Tokens, images or sounds."""
    generator = torch.Generator().manual_seed(1)
    if family in TEXT:
        return {"input_ids": token_ids(batch, 17)}
    if family == "whisper":
        return {"input_features": torch.randn(batch, 8, 24, generator=generator)}
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}


def output_of(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits, or what a model without them pools."""
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.pooler_output
