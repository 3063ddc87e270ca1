"""Speeds from a run's metrics, and a token's cost in a real cache."""

import pytest
import torch
from transformers import DynamicCache

from helpers.models import VARIANTS, random_ids, tiny_model
from motifarch.errors import UserError
from motifarch.study.speed import decoding_speed, fill_cache, kv_bytes_per_token, training_speed


def test_training_speed_is_the_median_after_the_start():
    speeds = [1.0, 2.0, 1000.0, *[float(s) for s in range(4, 21)]]
    rows = [{"tokens_per_second": s, "model_tflops": s / 10, "memory_gib": 2 + (s == 1.0)} for s in speeds]
    found = training_speed(rows)
    assert found == {"train_tokens_per_s": 12.5, "model_tflops": 1.25, "peak_memory_bytes": 3 * 2**30}
    assert training_speed(rows[:2])["train_tokens_per_s"] == 2.0  # of few steps, the first is still left out
    with pytest.raises(UserError, match="1 step;"):
        training_speed(rows[:1])


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_tokens_bytes_are_those_of_the_cache(variant):
    model, tokens = tiny_model(variant), 5
    found = decoding_speed(model, random_ids(2, tokens + 1), new_tokens=3, repeats=2)
    cache = model(random_ids(2, tokens), use_cache=True).past_key_values
    allocated = sum(t.untyped_storage().nbytes() for layer in cache.layers for t in (layer.keys, layer.values))
    config = model.config
    heads = 2 * config.num_key_value_heads * config.head_dim * 4  # keys and values, float32
    kept = min(tokens, config.sliding_window - 1) if config.use_sliding_window else tokens
    assert found["kv_bytes_per_token"] == config.num_hidden_layers * heads * kept // tokens
    if not config.use_sliding_window:  # a window's cache may hold a view
        assert found["kv_bytes_per_token"] == allocated // (2 * tokens)
    assert found["prefill_tokens"] == tokens
    assert found["decode_tokens_per_s"] > 0


def test_bfloat16_halves_them():
    ids = random_ids(1, 9)
    full, half = (
        decoding_speed(tiny_model(dtype=d), ids, new_tokens=2, repeats=1) for d in (torch.float32, torch.bfloat16)
    )
    assert half["kv_bytes_per_token"] * 2 == full["kv_bytes_per_token"]


def test_a_long_prompt_fills_the_cache_as_one_pass_does(monkeypatch):
    monkeypatch.setattr("motifarch.study.speed._PROMPT_PART", 7)
    model, ids = tiny_model(), random_ids(2, 30)
    parts, whole = fill_cache(model, ids), DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=whole)
    for a, b in zip(parts.layers, whole.layers, strict=True):
        assert a.keys.shape == (2, 2, 30, 16)
        torch.testing.assert_close(a.keys, b.keys)
        torch.testing.assert_close(a.values, b.values)
    assert kv_bytes_per_token(parts, 60) == kv_bytes_per_token(whole, 60)
