"""A model's fields are named in several places; here these are held together."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.models.motif.released_fields import LATER
from motifarch.models.motif.unsupported import ACTIVATIONS, ATTENTION_TYPES
from motifarch.portable.modeling_motif import MotifConfig as PortableConfig
from motifarch.train.init_from import config_differences
from motifarch.train.recipe import ModelSection

# Fields of generation, of tokenizers, or with a single value: nothing to choose in a recipe.
NOT_TRAINED = {"k_ratio", "attention_dropout", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"}
NOT_TRAINED |= {"score_func"}
TRANSFORMERS_OWN = {"rope_theta", "rope_scaling", "attn_implementation"}


def own(config: type) -> dict[str, dataclasses.Field[Any]]:
    """Fields that a config class adds or gives a default, without those of transformers' base."""
    return {f.name: f for f in dataclasses.fields(config) if f.name in vars(config)["__annotations__"]}


def test_the_recipe_has_the_configs_fields() -> None:
    recipe = {f.name for f in dataclasses.fields(ModelSection)} - {"vocab_multiple"}
    assert recipe - TRANSFORMERS_OWN == own(MotifConfig).keys() - NOT_TRAINED - {"rope_parameters"}
    config = MotifConfig(vocab_size=64, head_dim=8, rope_theta=ModelSection.rope_theta)
    assert config.rope_parameters["rope_theta"] == ModelSection.rope_theta


def test_the_docstring_explains_the_configs_fields() -> None:
    arguments = inspect.getdoc(MotifConfig).partition("Args:")[2].partition("Raises:")[0]  # type: ignore[union-attr]
    explained = re.findall(r"^    (\w+): ", arguments, flags=re.MULTILINE)
    assert explained == sorted(explained, key=list(own(MotifConfig)).index)
    assert set(explained) == {name for name in own(MotifConfig) if not name.endswith("_token_id")}


def test_the_portable_config_has_the_same_fields() -> None:
    ours, portable = own(MotifConfig), own(PortableConfig)
    # Of one value there; what a released file says of its layers, here checked and dropped.
    assert ours.keys() - portable.keys() == {"k_ratio", "attention_dropout", "v_head_dim", *LATER}
    assert portable.keys() - ours.keys() == {"layer_types"}
    assert all(str(ours[name].type) == str(portable[name].type) for name in ours.keys() & portable.keys())


def test_the_recipes_choices_are_those_that_are_computed() -> None:
    hints = get_type_hints(ModelSection)
    named, _an_import_path = get_args(hints["attention_type"])
    assert set(get_args(named)) == set(ATTENTION_TYPES)
    assert set(get_args(hints["hidden_act"])) == set(ACTIVATIONS)


# Of every field another value.
OTHERS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "num_noise_heads": 2,
    "num_key_value_heads": 8,
    "head_dim": 16,
    "attention_type": "diff_v1",
    "paired_kv": False,
    "attention_gate": True,
    "sub_norm": False,
    "qk_norm": True,
    "lambda_init_depth_offset": 1,
    "lambda_init": 0.5,
    "hidden_act": "silu",
    "poly_norm_eps": 1e-3,
    "rms_norm_eps": 1e-3,
    "attn_rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 7.0},
    "sliding_window": 5,
    "use_sliding_window": True,
    "sliding_window_period": 2,
    "swa_rope_theta": 7.0,
    "q_lora_rank": 24,
    "kv_lora_rank": 24,
    "qk_rope_head_dim": 2,
    "v_head_dim": 6,
    "num_experts": 8,
    "experts_top_k": 1,
    "num_shared_experts": 2,
    "moe_intermediate_size": 24,
    "n_dense_first_layers": 1,
    "interleave_moe_layer_step": 2,
    "route_norm": False,
    "route_scale": 2.0,
    "polynorm_sigmoid_weight": True,
    "polynorm_output_scale": 0.5,
    "polynorm_bias_clamp": 0.5,
    "hidden_clamp": 1.0,
    "mhc_enabled": True,
    "mhc_expansion_rate": 2,
    "mhc_sinkhorn_iters": 3,
    "mhc_h_post_alpha_end": 1.0,
    "num_nextn_predict_layers": 1,
    "use_bias": True,
    "tie_word_embeddings": True,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}
LATENT = {"attention_type": "gdla", "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4}
STREAMS = {"mhc_enabled": True}
EXPERTS = {"num_experts": 4, "experts_top_k": 2, "moe_intermediate_size": 16}
# What a field needs to have an effect.
NEEDS: dict[str, dict[str, Any]] = {
    "attention_gate": {"attention_type": "diff_v2"},
    "sliding_window": {"use_sliding_window": True, "sliding_window": 4},
    "use_sliding_window": {"sliding_window": 4},
    "sliding_window_period": WINDOW,
    "swa_rope_theta": WINDOW,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"), LATENT),
    **dict.fromkeys(("num_experts", "experts_top_k", "num_shared_experts", "moe_intermediate_size"), EXPERTS),
    **dict.fromkeys(("n_dense_first_layers", "interleave_moe_layer_step", "route_norm", "route_scale"), EXPERTS),
    **dict.fromkeys(("polynorm_bias_clamp", "hidden_clamp"), EXPERTS),
    **dict.fromkeys(("mhc_expansion_rate", "mhc_sinkhorn_iters", "mhc_h_post_alpha_end"), STREAMS),
}
# They change first weights, or what a length is checked against, but not what weights compute.
NO_EFFECT = {"initializer_range", "max_position_embeddings", "mhc_identity_init"}
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_noise_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def shapes(config: MotifConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in MotifForCausalLM(config).named_parameters()}


def test_every_field_is_tried() -> None:
    assert OTHERS.keys() == own(MotifConfig).keys() - NOT_TRAINED - NO_EFFECT


@pytest.mark.parametrize("name", OTHERS)
def test_another_value_is_seen_in_the_weights_or_warned_of(name: str, tmp_path: Path) -> None:
    fields = BASE | NEEDS.get(name, {})
    ours, theirs = MotifConfig(**fields), MotifConfig(**(fields | {name: OTHERS[name]}))
    (tmp_path / "config.json").write_text(json.dumps(theirs.to_dict()))
    assert config_differences(tmp_path, ours) or shapes(ours) != shapes(theirs)
