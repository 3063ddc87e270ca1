"""What a MotifConfig fills in and what it refuses."""

import pytest

from helpers.models import tiny_config, tiny_model
from motifarch.models.motif import MotifConfig


def test_defaults_are_the_12b_model_s():
    config = MotifConfig()
    assert (config.num_attention_heads, config.noise_heads, config.num_key_value_heads) == (40, 8, 16)
    assert config.value_width == 256


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
        ({"k_ratio": 2}, "k_ratio=2 is not supported; only 1 is"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported; only 0 is"),
        ({"use_sliding_window": True}, "use_sliding_window is on but sliding_window=None; give at least 1"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0; give at least 1"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_noise_heads": 4}, "num_heads=6 .* num_noise_heads=4"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3 must be even"),
        ({"num_key_value_heads": 8}, "num_noise_heads=2 is not a multiple of the 4 key/value pairs"),
        ({"attention_type": "diff_v2"}, "num_noise_heads=2 is not a multiple of the 4 key/value heads"),
        ({"attention_type": "softmax"}, "num_attention_heads=6 must be a multiple of num_key_value_heads=4"),
        ({"attention_type": "diff_v1"}, "'diff_v1' has one noise head for each signal head, but num_noise_heads=2 of"),
        ({"attention_gate": True}, "attention_gate works with attention_type 'diff_v2' without sub_norm"),
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


@pytest.mark.parametrize("value", [None, 1, 1.0])
def test_a_k_ratio_of_one_is_accepted(value):
    assert tiny_config(k_ratio=value).noise_heads == 2


def test_windows_count_the_token_itself():
    assert tiny_config(sliding_window=7, use_sliding_window=True).window_size == (6, 0)
    assert tiny_config(sliding_window=7).window_size == (-1, -1)
    assert tiny_config(sliding_window=7).layer_types == ["full_attention"] * 2


def test_lambda_starts_by_variant():
    def start(**changes):
        return [layer.self_attn.lambda_init for layer in tiny_model(**changes).model.layers]

    assert start() == pytest.approx([-0.00991528, 0.2])
    assert start(variant="diff_v1") == pytest.approx([0.2, 0.35550907])
    assert start(lambda_init_depth_offset=1) == pytest.approx([0.35550907, 0.47071302])
