"""Rotary embeddings as a config describes them."""

import math

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from motifarch.layers import RotaryEmbedding
from motifarch.models.motif.configuration_motif import MotifConfig


def build_rotary(config: MotifConfig) -> RotaryEmbedding:
    """Rotary embeddings with the config's theta and scaling: none, "yarn", "linear" or "llama3"."""
    assert config.head_dim is not None  # filled in by the config
    parameters = config.rope_parameters or {}
    kind, theta = parameters.get("rope_type", "default"), parameters.get("rope_theta", config.default_theta)
    if kind == "default":
        return RotaryEmbedding(config.head_dim, base=theta)
    with torch.device("cpu"):  # real numbers, also while the model is built on the meta device
        inv_freq, attention_scaling = ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))
        if kind == "yarn":
            inv_freq = yarn_frequencies(config)
    return RotaryEmbedding(config.head_dim, base=theta, inv_freq=inv_freq, attention_scaling=attention_scaling)


def yarn_frequencies(config: MotifConfig) -> Tensor:
    """YaRN's inverse frequencies (arXiv 2309.00071, section 3.2), (D / 2,) float64: transformers'
    own are float32.

    Pairs that turn more than ``beta_fast`` times over the original length keep their frequency,
    those that turn less than ``beta_slow`` times are slowed down by ``factor``, and those between
    go from one to the other linearly.
    """
    parameters, width = config.rope_parameters or {}, config.head_dim
    assert width is not None  # filled in by the config
    theta, length = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factor = parameters["factor"] or config.max_position_embeddings / length

    def pair_turning(times: float) -> float:
        return width * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(parameters.get("beta_fast") or 32), pair_turning(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    pairs = torch.arange(width // 2, dtype=torch.float64)
    frequencies = theta ** (-2 * pairs / width)
    slowed = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - slowed) + frequencies / factor * slowed
