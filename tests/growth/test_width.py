"""Width and heads: the same function, whatever grows; copies that training can tell apart."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.grown import grown, largest_difference, loaded, saved
from helpers.models import VARIANTS, random_ids, tiny_model
from motifarch.errors import UserError
from motifarch.growth import Noise, SourceFolder, describe, widen

DIFFERENTIAL = [variant for variant in VARIANTS if variant != "softmax"]
CASES = [(v, {"hidden": 2, "feed_forward": 3}) for v in VARIANTS]
CASES += [(v, {"heads": 2}) for v in VARIANTS]
CASES += [(v, {"signal_heads": 3}) for v in DIFFERENTIAL]


@pytest.mark.parametrize(("variant", "factors"), CASES, ids=str)
def test_the_function_stays(tmp_path, variant, factors):
    source = saved(tmp_path / "small", variant, initializer_range=0.1)
    output = grown(source, **factors)
    assert largest_difference(source, output) < 1e-5
    assert largest_difference(source, output, torch.float64) < 1e-6  # of float32's weights: their quotients are rounded


@settings(max_examples=12, deadline=None)
@given(
    hidden=st.integers(1, 3),
    feed_forward=st.integers(1, 3),
    heads=st.integers(1, 3),
    signal_heads=st.integers(1, 4),
    noise_heads=st.sampled_from([2, 4]),
    ratio=st.integers(1, 3),
    pairs=st.integers(1, 2),
    noise=st.sampled_from([None, Noise(0.2, 1)]),
)
def test_any_factors_and_head_counts(
    tmp_path_factory, hidden, feed_forward, heads, signal_heads, noise_heads, ratio, pairs, noise
):
    factors = {"hidden": hidden, "feed_forward": feed_forward, "heads": heads, "signal_heads": signal_heads}
    if set(factors.values()) == {1}:
        factors["hidden"] = 2
    source = saved(
        tmp_path_factory.mktemp("any") / "small",
        num_attention_heads=noise_heads * (ratio + 1),
        num_noise_heads=noise_heads,
        num_key_value_heads=2 * pairs,
        initializer_range=0.1,
    )
    output = grown(source, noise=noise, **factors)
    config = json.loads((output / "config.json").read_text())
    assert config["num_noise_heads"] == noise_heads * heads
    assert config["num_attention_heads"] == noise_heads * heads * (ratio * signal_heads + 1)
    assert config["num_key_value_heads"] == 2 * pairs * heads
    assert largest_difference(source, output) < 1e-5


@pytest.mark.parametrize("bias", [False, True])
def test_a_tied_embedding_stays_tied_or_is_untied_on_request(tmp_path, bias):
    source = saved(tmp_path / "small", "gda tied", use_bias=bias, initializer_range=0.1)
    tied, untied = grown(source, "tied", hidden=2), grown(source, "untied", hidden=2, untie=True)
    assert largest_difference(source, tied) < 1e-5
    assert largest_difference(source, untied) < 1e-5
    for folder, shared in ((tied, True), (untied, False)):
        model = loaded(folder)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == shared
        assert ("lm_head.weight" not in SourceFolder(folder).names) == shared


def test_generation_from_a_cache_gives_the_same_tokens(tmp_path):
    source = saved(tmp_path / "small")
    output = grown(source, hidden=2, signal_heads=2, heads=2)
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    one, other = (loaded(folder, torch.float64).generate(ids, **options) for folder in (source, output))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("variant", "factors"), [("gda", {"signal_heads": 2}), ("diff_v2 gated", {"hidden": 2})])
@pytest.mark.parametrize("noise", [None, Noise(0.01, 3)])
def test_noise_makes_copies_learn_different_things(tmp_path, variant, factors, noise):
    source = saved(tmp_path / "small", variant)
    output = grown(source, noise=noise, **factors)
    assert largest_difference(source, output, torch.float64) < 1e-5
    model, ids = loaded(output).train(), random_ids(2, 19)
    model(input_ids=ids, labels=ids).loss.backward()
    attention = model.model.layers[0].self_attn
    if variant == "gda":  # blocks of [2, 2 copies, 1 noise head]
        gradient = attention.q_proj.weight.grad.unflatten(0, (2, 5, 8))
        one, other = gradient[:, :2], gradient[:, 2:4]
    else:
        one, other = attention.o_proj.weight.grad.chunk(2)
    difference = float((one - other).norm() / one.norm())
    assert (difference > 1e-4) if noise else (difference < 1e-5)


def test_noise_is_the_seed_s(tmp_path):
    source = saved(tmp_path / "small")
    outputs = []
    for i, seed in enumerate([1, 1, 2]):
        outputs.append(grown(source, str(i), hidden=2, noise=Noise(0.1, seed)))
    first, again, other = (SourceFolder(folder).read("model.layers.1.mlp.up_proj.weight") for folder in outputs)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    plain = SourceFolder(source).read("model.layers.1.mlp.up_proj.weight").repeat(1, 2) / 2
    assert float((first - plain).std() / plain.std()) == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize(
    ("factors", "noise", "reasons"),
    [
        ({"hidden": 2, "signal_heads": 4}, None, []),
        ({"hidden": 3}, None, ["no exact 1/3 of a weight"]),
        ({"hidden": 2}, Noise(0.1), ["no room for noise that cancels exactly"]),
        ({"feed_forward": 3, "heads": 5}, Noise(0.1), ["no exact 1/3 or 1/5", "no room for noise"]),
    ],
)
def test_bfloat16_says_what_it_can_not_keep_and_float32_keeps_it(tmp_path, factors, noise, reasons):
    source = saved(tmp_path / "small", dtype=torch.bfloat16, initializer_range=0.1)
    (step,) = widen(describe(SourceFolder(source)), **factors, noise=noise).steps
    assert bool(step.loss) == bool(reasons)
    assert all(reason in step.loss and "0.39%" in step.loss for reason in reasons)
    output = grown(source, **factors, noise=noise)
    assert (largest_difference(source, output, torch.float32) < 1e-5) == (not reasons)
    exact = grown(source, "exact", **factors, noise=noise, dtype=torch.float32)
    assert json.loads((exact / "config.json").read_text())["dtype"] == "float32"
    assert largest_difference(source, exact, torch.float32) < 1e-5
    assert all(s.loss is None for s in widen(describe(SourceFolder(source), torch.float32), **factors).steps)


@pytest.mark.parametrize(
    ("variant", "factors", "message"),
    [
        ("softmax", {"signal_heads": 2}, "--signal-heads 2: this model's attention_type is 'softmax'"),
        ("gda", {"hidden": 0}, "--hidden is 0; give a whole multiple"),
        ("gda", {"feed_forward": -2}, "--feed-forward is -2; give a whole multiple"),
        ("gda", {"noise": Noise(0.1)}, "--noise has nothing to tell apart"),
        ("gda", {"noise": Noise(-0.1), "hidden": 2}, "--noise is -0.1; give a positive number"),
        ("gda", {"noise": Noise(float("nan")), "hidden": 2}, "--noise is nan; give a positive number"),
    ],
)
def test_factors_that_do_not_fit(tmp_path, variant, factors, message):
    tiny_model(variant).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        widen(describe(SourceFolder(tmp_path)), **factors)
