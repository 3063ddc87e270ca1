"""What a MotifConfig fills in and what it refuses."""

import json
import logging
import math

import pytest
import torch
from transformers import AutoConfig

from helpers.models import tiny_config, tiny_model
from helpers.released import MOTIF_2B, YARN
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.models.motif.rotary import build_rotary


def test_defaults_are_the_12b_model_s():
    config = MotifConfig()
    assert (config.num_attention_heads, config.noise_heads, config.num_key_value_heads) == (40, 8, 16)
    assert config.v_head_dim == 256


@pytest.mark.parametrize("given", [{}, {"num_noise_heads": None}], ids=["absent", "null"])
def test_half_of_the_heads_are_noise_in_files_that_do_not_say(given):
    saved = {"num_attention_heads": 32, "hidden_size": 512, "num_hidden_layers": 1, **given}
    config = MotifConfig.from_dict(saved)
    assert config.noise_heads == 16
    assert config.num_key_value_heads == 32
    assert config.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "linear"}, "attention_type='linear' is not supported; choose one of gda, diff_v1"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; choose one of poly_norm, silu"),
        ({"use_sliding_window": True}, "use_sliding_window is on but sliding_window=None; give at least 1"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0; give at least 1"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_noise_heads": 4}, "num_heads=6 .* num_noise_heads=4"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must be even"),
        ({"num_key_value_heads": 8}, "num_noise_heads=2 is not a multiple of the 4 key/value pairs"),
        ({"attention_type": "diff_v2"}, "num_noise_heads=2 is not a multiple of the 4 key/value heads"),
        ({"attention_type": "softmax"}, "num_attention_heads=6 must be a multiple of num_key_value_heads=4"),
        ({"attention_type": "diff_v1"}, "'diff_v1' has one noise head for each signal head, but num_noise_heads=2 of"),
        ({"attention_gate": True}, "attention_gate works with"),
        ({"paired_kv": False, "num_key_value_heads": 4}, "noise_heads=2 is not a multiple of the 4 key/value heads"),
        ({"paired_kv": True, "attention_type": "diff_v2", "num_key_value_heads": 2}, "paired_kv is on, but"),
        ({"lambda_init": 0.2, "attention_type": "softmax", "num_key_value_heads": 2}, "lambda_init=0.2 works with"),
        ({"lambda_init": 0.2, "lambda_init_depth_offset": 1}, "lambda_init=0.2 and lambda_init_depth_offset=1"),
        (
            {"attention_type": "diff_v2", "num_key_value_heads": 2, "attention_gate": True, "sub_norm": True},
            "attention_gate works with",
        ),
    ],
    ids=str,
)
def test_what_no_layer_computes_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


WINDOW = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "silu_and_mul"}, "hidden_act='silu_and_mul' is not supported; choose one of poly_norm, silu"),
        ({"k_ratio": 2}, "k_ratio=2 is not supported; only 1 is"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; only 0 is"),
        ({"attention_bias": True}, "attention_bias=True is not supported with use_bias=False"),
        ({"mlp_bias": False, "use_bias": True}, "mlp_bias=False is not supported with use_bias=True"),
        ({"qkv_bias": True}, "qkv_bias=True is not supported"),
        ({"is_causal": False}, "is_causal=False is not supported; only True is"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported; only False is"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported; only False is"),
        ({"pruned_heads": {"3": [0, 1]}}, r"pruned_heads=\{.*\} is not supported"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported; leave it out"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512 is not supported"),
        ({"num_experts": 384}, "num_experts=384 needs experts_top_k"),
        ({"quantization_config": {"quant_method": "odd"}}, "quantization_config has quant_method='odd'"),
        ({"num_noise_heads": 5}, "num_heads=16 .* cannot be cut into num_noise_heads=5"),
        ({"num_key_value_heads": 6}, "num_noise_heads=8 is not a multiple of the 3 key/value pairs"),
        (WINDOW | {"max_window_layers": 28}, "max_window_layers=28 is not supported with use_sliding_window on"),
        (
            WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 16},
            "layer_types has 'full_attention' for layer 1",
        ),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types has 'sliding_attention' for layer 0"),
        (
            {"layer_types": ["full_attention", "chunked_attention"] * 16},
            "layer_types has 'chunked_attention' for layer 1",
        ),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern=6 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; only 1 is"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported; choose one of"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64}},
            "rope_type='longrope' is not supported",
        ),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_type='ntk' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' needs factor"),
        ({"rope_scaling": YARN | {"factor": -1}}, "factor=-1 must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "factor=None must be a number above 0"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": None}}, "original_max_position_embeddings=None"),
        ({"rope_theta": None}, "rope_theta=None must be a number above 1"),
        ({"rope_scaling": YARN | {"extrapolation_factor": 0.5}}, "extrapolation_factor=0.5 is not supported"),
        ({"rope_scaling": YARN | {"attn_factor": -1.0}}, "attn_factor=-1.0 must be a number above 0"),
        ({"rope_scaling": YARN | {"apply_yarn_scaling": 0}}, "apply_yarn_scaling=0 must be true or false"),
        ({"rope_scaling": YARN | {"attn_factor": 2.0, "mscale": 1.0}}, "attn_factor and mscale are both given"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attn_factor": 2.0}}, "attn_factor, which"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            r"rope_parameters is given by kind of layer \(full_attention\)",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_theta is 500000.0 but .*=10000.0"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 8.0}},
            "rope_scaling's factor is 4.0 but rope_parameters has factor=8.0",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_a_folder_that_asks_for_something_else_is_refused(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(MOTIF_2B | fields))
    for config in (MotifConfig, AutoConfig):
        with pytest.raises(ValueError, match=message):
            config.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {
            "attention_bias": False,
            "mlp_bias": False,
            "partial_rotary_factor": 1.0,
            "pruned_heads": {},
            "is_decoder": False,
        },
        {"max_window_layers": 28, "sliding_window": 4096, "layer_types": ["full_attention"] * 32},
        WINDOW | {"layer_types": ["sliding_attention"] * 32},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_experts": None, "kv_lora_rank": None, "label_smoothing": 0.1, "layerdrop": 0.1, "temperature": 0.7},
    ],
    ids=lambda value: "-".join(value),
)
def test_what_changes_nothing_is_accepted(tmp_path, fields):
    (tmp_path / "config.json").write_text(json.dumps(MOTIF_2B | fields))
    config = MotifConfig.from_pretrained(tmp_path)
    assert config.rope_parameters["rope_theta"] == 5e5
    kind = "sliding_attention" if config.use_sliding_window else "full_attention"
    assert config.layer_types == [kind] * 32


def test_fields_set_after_the_config_was_made_are_looked_at_by_the_model():
    config = tiny_config()
    config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="hidden_act='gelu' is not supported"):
        MotifForCausalLM(config)


def test_kinds_of_layers_follow_the_window_s_switch(tmp_path):
    tiny_config("gda window").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == ["sliding_attention"] * 2
    config = MotifConfig.from_pretrained(tmp_path, use_sliding_window=False)
    assert config.layer_types == ["full_attention"] * 2
    config.save_pretrained(tmp_path)
    assert MotifConfig.from_pretrained(tmp_path).layer_types == ["full_attention"] * 2


@pytest.mark.parametrize("model_type", ["Motif", "motif"])
def test_either_spelling_of_the_type_is_read_without_a_word(tmp_path, model_type, caplog, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps(MOTIF_2B | {"model_type": model_type}))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    for config in (MotifConfig, AutoConfig):
        assert config.from_pretrained(tmp_path).model_type == "Motif"
    assert not caplog.records


def test_a_file_without_theta_means_10_000():
    assert MotifConfig.from_dict({"num_hidden_layers": 1}).rope_parameters["rope_theta"] == 10_000.0
    assert MotifConfig().rope_parameters["rope_theta"] == 1_000_000.0


def test_rotary_settings_that_are_passed_in_stay_as_they_are():
    scaling = dict(YARN)
    tiny_config(rope_scaling=scaling, rope_theta=5e5)
    assert scaling == YARN


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attn_factor": 1.5, "extrapolation_factor": 1.0}, 1.5 * (0.1 * math.log(4) + 1)),
        ({"attn_factor": 1.5, "factor": None}, 1.5 * (0.1 * math.log(8) + 1)),
        ({"attn_factor": 1.5, "apply_yarn_scaling": False}, 1.5),
        ({"apply_yarn_scaling": False}, 1.0),
    ],
)
def test_vllms_keys_of_yarn_mean_what_they_mean_there(tmp_path, field, keys, expected):
    theta = {"rope_theta": 5e5} if field == "rope_parameters" else {}
    config = tiny_config(**{field: YARN | theta | keys, "rope_theta": 5e5, "max_position_embeddings": 512})
    config.save_pretrained(tmp_path)
    for each in (config, MotifConfig.from_pretrained(tmp_path)):
        cos, sin = build_rotary(each)(torch.arange(3)[None])
        torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, expected**2))


def test_no_rotary_parameter_is_lost_where_the_other_field_lacks_it():
    config = tiny_config(rope_scaling=YARN, rope_theta=5e5, rope_parameters=YARN | {"attention_factor": 2.0})
    assert build_rotary(config).attention_scaling == 2.0


@pytest.mark.parametrize("value", [None, 1, 1.0])
def test_a_k_ratio_of_one_is_accepted(value):
    assert tiny_config(k_ratio=value).noise_heads == 2


def test_windows_count_the_token_itself():
    assert tiny_config(sliding_window=7, use_sliding_window=True).windows == [(6, 0)] * 2
    assert tiny_config(sliding_window=7).windows == [(-1, -1)] * 2
    assert tiny_config(sliding_window=7).layer_types == ["full_attention"] * 2


def test_lambda_starts_by_variant():
    def start(**changes):
        return [layer.self_attn.lambda_init for layer in tiny_model(**changes).model.layers]

    assert start() == pytest.approx([-0.00991528, 0.2])
    assert start(variant="diff_v1") == pytest.approx([0.2, 0.35550907])
    assert start(lambda_init=0) == [0.0, 0.0]
    assert start(lambda_init_depth_offset=1) == pytest.approx([0.35550907, 0.47071302])
