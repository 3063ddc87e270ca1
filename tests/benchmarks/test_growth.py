"""The growth benchmark on a few steps: what it trains and compares."""

import json
from pathlib import Path

import pytest

from benchmarks.models.growth import main
from helpers.tiny import prepare_text


@pytest.mark.slow
def test_a_few_steps(tmp_path: Path) -> None:
    data, output = prepare_text(tmp_path), tmp_path / "growth.json"
    options = {"data": data, "small-steps": 4, "steps": 2, "every": 2, "threads": 1, "output": output}
    assert main([text for name, value in options.items() for text in (f"--{name}", str(value))]) == 0
    content = json.loads(output.read_text())
    small, grown, scratch = (content["runs"][run] for run in ("small", "grown", "scratch"))
    assert (small["steps"], grown["steps"], scratch["steps"]) == ([2, 4], [2], [2, 4, 6])
    assert grown["parameters"] == scratch["parameters"] > 3 * small["parameters"]
    # Equal tokens, counted both ways; and the small model's cost less.
    assert scratch["tokens"][-1] == small["tokens"][-1] + grown["tokens"][-1] == 6 * 4 * 32
    assert scratch["flops"][-1] > small["flops"][-1] + grown["flops"][-1]
    assert content["growth"]["logits"]["largest"] < 1e-4 * content["growth"]["logits"]["spread"]
    # The grown model began where the small one ended: two steps don't take it back.
    assert grown["loss"][0] < scratch["loss"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--steps", "30"], "--steps is 30, no multiple of --every 25"),
        (["--data", "nowhere"], "--data nowhere holds no prepared data; make it with `motifarch data prepare"),
    ],
)
def test_slips(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    assert message in capsys.readouterr().err
