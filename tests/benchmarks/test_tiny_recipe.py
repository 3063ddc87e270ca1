"""The choice of the tiny recipe, on little text and few steps."""

import json
from pathlib import Path

import pytest

from benchmarks.models.tiny_recipe import main


@pytest.mark.nightly
def test_candidates_train_for_equal_time(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(" ".join(f"word{(i * j) % 97}" for j in range(2000)))
    output = tmp_path / "results.json"
    options = ["--seconds", "1", "--source", f"files:{tmp_path}/*.txt", "--output", str(output)]
    assert main([*options, "--only", "before", "narrow_128", "--jobs", "2", "--work", str(tmp_path / "work")]) == 0
    before, chosen = json.loads(output.read_text())["models"]
    assert chosen["parameters"] < before["parameters"]
    assert 0 < chosen["bits_per_byte"] < 20
    # Each trained as long as its own speed says, which this test does not judge.
    assert chosen["tokens"] == 128 * 16 * chosen["steps"] > 0
    assert before["tokens"] == 512 * 4 * before["steps"] > 0
