"""Loads with the bias and without, in a few steps on little text."""

import json
from pathlib import Path

import pytest

from benchmarks.models.expert_balance import main
from helpers.tiny import prepare_text


@pytest.mark.nightly
def test_both_runs_are_reported(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    short = {"run.steps": 4, "optim.warmup_steps": 1, "optim.decay_steps": 1, "log.every": 2, "validation.sequences": 4}
    options = ["--data", str(prepare_text(tmp_path)), "--work", str(tmp_path / "runs"), "--output", str(output)]
    assert main([*options, "--", *(f"--{field}={value}" for field, value in short.items())]) == 0
    moved, stayed = json.loads(output.read_text())["runs"]
    assert moved["steps"] == stayed["steps"] == [2, 4]
    assert min(map(min, moved["router_bias_range"])) > 0
    assert max(map(max, stayed["router_bias_range"])) == 0
    assert output.with_suffix(".png").is_file()
