"""A study with real training: killed in the middle, it ends the same."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import wait_until
from helpers.tiny import prepare_text
from helpers.tiny_study import command, write_grid
from motifarch.study.main import main
from motifarch.train.main import main as train
from motifarch.train.run_folder import read_metrics

RUNS = Path("runs/tiny")


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (r["step"], r["loss"], r["grad_norm"], r.get("validation_loss")) for r in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    """The parent alone is killed: its run ends with it and resumes."""
    data, out = prepare_text(tmp_path), tmp_path / "out"
    # Long enough to be caught at work; the second variant is finished already, as far as the study
    # can see.
    grid = write_grid(tmp_path, data, tokens=7680)
    gda, softmax = (out / RUNS / name / "seed_0" for name in ("gda_2to1_poly_norm", "softmax_gqa_poly_norm"))
    softmax.mkdir(parents=True)
    made_up = {"steps": 60, "tokens": 7680, "curve": [], "validation": [], "validation_loss": 3.0}
    (softmax / "result.json").write_text(json.dumps(made_up))

    process = subprocess.Popen(
        command(grid, out, "--threads", "1"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_until(lambda: len(read_metrics(gda / "metrics.jsonl")) > 10, process)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    # Waits for the run that was left behind, and takes it up where it was.
    assert main([str(grid), "--output", str(out), "--threads", "1"]) == 0
    assert not (gda / "failed.json").exists()
    starts = json.loads((gda / "run.json").read_text())["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]

    assert train([str(gda / "recipe.yaml"), "--run.output", str(tmp_path / "whole")]) == 0
    assert losses(gda) == losses(tmp_path / "whole")
    assert json.loads((softmax / "result.json").read_text()) == made_up

    # What it left can be lost and joined again.
    found = json.loads((out / "results.json").read_text())
    run = next(r for r in found["runs"] if r["variant"] == "gda 2:1 poly_norm")
    assert run["validation_loss"] == losses(tmp_path / "whole")[-1][3]
    assert {"probe", "attention", "speed"} <= set(run)
    assert all((out / name).is_file() for name in ("report.html", "report.md"))
    (out / "results.json").rename(tmp_path / "earlier.json")
    before = (gda / "result.json").stat().st_mtime_ns
    again = [str(grid), "--output", str(out), "--threads", "1", "--compare", str(tmp_path / "earlier.json")]
    assert main(again) == 0
    assert json.loads((out / "results.json").read_text())["runs"] == found["runs"]
    assert "earlier" in (out / "report.md").read_text()
    assert (gda / "result.json").stat().st_mtime_ns == before
