"""A finished run, measured: complete, the same again, and errors that help."""

import json

import numpy as np
import pytest

from motifarch.errors import UserError
from motifarch.study.measure import main, measure
from motifarch.study.measure_options import MeasureOptions

QUICK = MeasureOptions(lengths=(100, 140), samples=4, attention_rows=3, prefill_tokens=20, new_tokens=4, repeats=2)


def test_a_run_is_measured(finished_run):
    stages = []
    found = measure(finished_run, seed=1, options=QUICK, show=stages.append)
    assert [stage.split()[0] for stage in stages] == ["checkpoint", "retrieval", "retrieval", "attention", "decoding"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    record = json.loads((finished_run / "run.json").read_text())

    probe = found["probe"]
    assert probe["lengths"] == [100, 140]
    for name in ("accuracy", "loss", "gain", "binding", "gain_error", "binding_error"):
        assert np.shape(probe[name]) == (2, len(probe["depths"]))
        assert np.isfinite(probe[name]).all()

    attention = found["attention"]
    assert attention["gradient_norm_spikes"] == 0
    assert attention["queries"] > 32
    assert len(attention["layers"]) == record["model_config"]["num_hidden_layers"]
    last = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    # The metrics have lambda as it was before the last step, a step of less than 0.01 away.
    for layer, lam in zip(attention["layers"], last["lambda"], strict=True):
        assert layer["lambda"] == pytest.approx(lam, abs=0.05)

    speed = found["speed"]
    assert speed["prefill_tokens"] == 20
    assert speed["decode_dtype"] == record["compute"]
    assert speed["train_tokens_per_s"] > 0
    assert speed["peak_memory_bytes"] > 2**20

    again, other = measure(finished_run, seed=1, options=QUICK), measure(finished_run, seed=2, options=QUICK)
    assert again["probe"] == probe
    assert again["attention"] == attention
    assert other["attention"] == attention
    assert other["probe"]["gain"] != probe["gain"]


def test_as_a_command(finished_run, tmp_path, capsys):
    output = tmp_path / "new" / "measured.json"
    options = ["--samples", "4", "--lengths", "100", "--depths", "0.2", "0.8", "--attention-rows", "1"]
    decoding = ["--prefill-tokens", "8", "--new-tokens", "2", "--repeats", "1"]
    assert main([str(finished_run), "--output", str(output), "--seed", "5", *options, *decoding]) == 0
    assert str(output) in capsys.readouterr().out
    found = json.loads(output.read_text())
    assert found.keys() == {"probe", "attention", "speed"}
    assert found["probe"]["depths"] == [0.2, 0.8]
    assert found["speed"]["prefill_tokens"] == 8


def test_refuses_with_a_reason(finished_run, tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        measure(tmp_path, seed=0)
    with pytest.raises(UserError, match="cannot be used"):
        measure(finished_run, seed=0, device="cuda:99", options=QUICK)
    with pytest.raises(UserError, match="repeats is 0"):
        MeasureOptions(repeats=0)
    record = json.loads((finished_run / "run.json").read_text())
    positions = record["model_config"]["max_position_embeddings"]
    with pytest.raises(UserError, match=f"{positions} positions"):
        measure(finished_run, seed=0, options=MeasureOptions(samples=4, attention_rows=1, new_tokens=positions))
