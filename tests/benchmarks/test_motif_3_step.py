"""The step of the tiny Motif-3 recipe and its plain self: the same losses, at a smaller size."""

import json
from pathlib import Path

import pytest

from benchmarks.models import motif_3_step


def test_plain_and_fused_are_one_model(tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    names = ["eager", "eager_packed", "motifarch"]
    arguments = ["--quick", "--rounds", "1", "--output", str(output), "--models", *names]
    assert motif_3_step.main(arguments) == 0  # which compares losses
    rows = json.loads(output.read_text())["results"]
    assert [row["model"] for row in rows] == names
    assert rows[0]["peak_bytes"] > rows[2]["peak_bytes"]


def test_another_loss_is_an_error() -> None:
    with pytest.raises(motif_3_step.UserError, match="step 2 motifarch has the loss nan"):
        motif_3_step.check({"eager": [1.0, 2.0], "motifarch": [1.0, float("nan")]})
