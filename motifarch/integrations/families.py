"""The transformers families that tests patch, and what the shape of their attention modules does
not tell.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Forward:
    """How an attention module's own forward goes about its queries: seen when it runs
    (:mod:`motifarch.integrations.probe`).

    Args:
        norm_heads_dim: the dimension that counts heads where ``q_norm`` sees them; -1 where it
            sees them side by side, (B, S, H D); None if there is no such norm.
        hands_on: it hands keyword arguments that it does not know on to the attention function.
    """

    norm_heads_dim: int | None = None
    hands_on: bool = True


PLAIN = Forward()

FAMILIES = {
    "arcee": PLAIN,
    "axk1": PLAIN,
    "axk2": PLAIN,
    "bert": PLAIN,
    "cohere2": PLAIN,
    "deepseek_v3": PLAIN,
    "dinov2": PLAIN,
    "ernie4_5": PLAIN,
    "exaone4": Forward(norm_heads_dim=1),
    "exaone_moe": Forward(norm_heads_dim=1),
    "gemma2": PLAIN,
    "gemma3_text": Forward(norm_heads_dim=1),
    "glm": PLAIN,
    "glm4": PLAIN,
    "granite": PLAIN,
    "hyperclovax": PLAIN,
    "llama": PLAIN,
    "ministral": PLAIN,
    "mistral": PLAIN,
    "mixtral": PLAIN,
    "modernbert": PLAIN,
    "olmo2": Forward(norm_heads_dim=-1),
    "phi3": PLAIN,
    "qwen2": PLAIN,
    "qwen3": Forward(norm_heads_dim=2),
    "qwen3_moe": Forward(norm_heads_dim=2),
    "seed_oss": PLAIN,
    "siglip_vision_model": Forward(hands_on=False),
    "smollm3": PLAIN,
    "solar_open": PLAIN,
    "vit": PLAIN,
    "whisper": PLAIN,
}
"""By ``model_type``. Others are patched where a probe shows the same function; these can be on the
meta device too, where nothing can be run.
"""
