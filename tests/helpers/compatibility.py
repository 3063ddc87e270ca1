"""The models of docs/compatibility.md's columns: every attention type, the released layouts and
patched models, small and random.
"""

from typing import Any

import pytest
import torch

from helpers.host_models import RATIOS, host_model, moved
from helpers.models import tiny_model
from helpers.released import MOTIF_2B, MOTIF_12B
from motifarch.integrations import patch
from motifarch.models.motif import MotifConfig, MotifForCausalLM

# Widths that 32 rows and groups of 64 weights divide, for 4-bit scales.
_SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
_TYPES: dict[str, dict[str, Any]] = {
    "softmax": {"num_attention_heads": 8},
    "diff_v1": {},
    "diff_v2": {"num_attention_heads": 8},
    "gda": {"qk_norm": True},
}
_SMALL = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.1}
_RELEASED: dict[str, dict[str, Any]] = {
    "2.6B": MOTIF_2B | _SMALL | {"hidden_size": 128, "intermediate_size": 128},
    "12.7B": MOTIF_12B | _SMALL | _SIZES | {"head_dim": 8},
}
_PATCHED: dict[str, dict[str, Any]] = {
    "llama": {"attention": "gda", "feed_forward": "polynorm"},
    "qwen3": {"attention": "diff_v2", "sub_norm": True},
}

COLUMNS = (*_TYPES, *_RELEASED, *_PATCHED)


def build(name: str, **overrides: Any) -> Any:
    """A column's model, in evaluation mode; overrides are fields of its config."""
    torch.manual_seed(0)
    if name in _TYPES:
        return tiny_model(name, **({"initializer_range": 0.1} | _SIZES | _TYPES[name] | overrides))
    if name in _RELEASED:
        return MotifForCausalLM(MotifConfig.from_dict(_RELEASED[name] | overrides)).eval()
    model = host_model(name, **(_SIZES | overrides))
    patch(model, ratio=RATIOS[name], **_PATCHED[name])
    return moved(model)


def cells(*fast: str) -> pytest.MarkDecorator:
    """Runs a test for each column, as the cells of one row; all but some are nightly."""
    nightly = pytest.mark.nightly
    return pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in fast else nightly) for n in COLUMNS])
