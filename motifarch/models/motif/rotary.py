"""Rotary embeddings as a config describes them, and the scale of logits that goes with them."""

import math

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motifarch.layers import RotaryEmbedding
from motifarch.models.motif.configuration_motif import FULL, WINDOW, MotifConfig


def build_rotaries(config: MotifConfig) -> nn.ModuleDict:
    """The rotary embeddings of each type of layer (transformers' names): the config's, but with
    ``swa_rope_theta`` layers with a window have that theta and no scaling.
    """
    kinds = set(config.layer_types) | {mtp_layer_type(config)}
    return nn.ModuleDict({kind: build_rotary(config, kind) for kind in sorted(kinds)})


def mtp_layer_type(config: MotifConfig) -> str:
    """Which type of layer predicts the token after the next one: one with a window, if any has."""
    return WINDOW if WINDOW in config.layer_types else FULL


def build_rotary(config: MotifConfig, kind: str = FULL) -> RotaryEmbedding:
    """Rotary embeddings of a type of layer, with the config's theta and scaling: none, "yarn",
    "linear" or "llama3".
    """
    parameters, width = config.rope_parameters or {}, config.rotary_dim
    theta = parameters.get("rope_theta", config.default_theta)
    if kind == WINDOW and config.swa_rope_theta is not None:
        return RotaryEmbedding(width, base=config.swa_rope_theta)
    scaling = parameters.get("rope_type", "default")
    if scaling == "default":
        return RotaryEmbedding(width, base=theta)
    with torch.device("cpu"):  # real numbers, also while the model is built on the meta device
        if config.is_latent:  # YaRN, whose mscale is the logits' (`softmax_scale`)
            return RotaryEmbedding(width, base=theta, inv_freq=yarn_frequencies(config))
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[scaling](config, device=torch.device("cpu"))
        if scaling == "yarn":
            inv_freq = yarn_frequencies(config)
    return RotaryEmbedding(width, base=theta, inv_freq=inv_freq, attention_scaling=attention_scaling)


def softmax_scale(config: MotifConfig, kind: str) -> float | None:
    """What logits are multiplied by in layers of a type: with latent attention and YaRN,
    ``head_dim ** -0.5 (0.1 mscale log(factor) + 1) ** 2``; else None, the layers' default.
    """
    parameters = config.rope_parameters or {}
    if not config.is_latent or parameters.get("rope_type", "default") != "yarn":
        return None
    if kind == WINDOW and config.swa_rope_theta is not None:
        return None
    assert config.head_dim is not None  # filled in by the config
    factor = max(_yarn_factor(config), 1.0)
    return float(config.head_dim**-0.5 * (0.1 * (parameters.get("mscale") or 0.0) * math.log(factor) + 1.0) ** 2)


def _yarn_factor(config: MotifConfig) -> float:
    parameters = config.rope_parameters or {}
    length = parameters["original_max_position_embeddings"]
    return float(parameters["factor"] or config.max_position_embeddings / length)


def yarn_frequencies(config: MotifConfig) -> Tensor:
    """YaRN's inverse frequencies (arXiv 2309.00071, section 3.2), (D / 2,) float64: transformers'
    own are float32.

    Pairs that turn more than ``beta_fast`` times over the original length keep their frequency,
    those that turn less than ``beta_slow`` times are slowed down by ``factor``, and those between
    go from one to the other linearly.
    """
    parameters, width = config.rope_parameters or {}, config.rotary_dim
    theta, length = parameters["rope_theta"], parameters["original_max_position_embeddings"]

    def pair_turning(times: float) -> float:
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast") or 32), pair_turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = theta ** (-2 * pairs / width)
    slowed = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / _yarn_factor(config) * slowed
