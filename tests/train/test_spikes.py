"""The spike guard in a run: reported, saved, and bitwise the same after a resume."""

from pathlib import Path

import pytest

from motifarch.train.main import main
from motifarch.train.run_folder import read_metrics

# A low bar and a high learning rate, so that there are spikes.
GUARD = ("--optim.lr", "3e-2", "--run.spike_sigma", "0.5", "--run.spike_window", "4", "--run.spike_max_in_row", "3")
SHORT = ("--validation.every", "0", "--checkpoint.every", "8", "--log.every", "4")


def train(recipe: Path, output: Path, *options: str) -> list[tuple[int, float, int, int]]:
    assert main([str(recipe), "--run.output", str(output), *SHORT, *options]) == 0
    return [(r["step"], r["loss"], r["skipped"], r["spike"]) for r in read_metrics(output / "metrics.jsonl")]


def test_a_resumed_run_skips_the_same_steps(recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = train(recipe, tmp_path / "whole", *GUARD, "--run.steps", "20")
    spikes = [spike for *_, spike in whole]
    assert sum(spikes[8:]) > 0
    assert [skipped for *_, skipped, _ in whole] == spikes
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]["skipped_total"] == sum(spikes)
    assert f"{sum(spikes)} step" in capfd.readouterr().out
    train(recipe, tmp_path / "parts", *GUARD, "--run.steps", "8")
    assert train(recipe, tmp_path / "parts", *GUARD, "--run.steps", "20") == whole


def test_a_guard_may_come_go_and_change_on_resume(recipe: Path, tmp_path: Path) -> None:
    train(recipe, tmp_path / "run", "--run.steps", "8")
    train(recipe, tmp_path / "run", *GUARD, "--run.steps", "16")
    other = (*GUARD, "--run.spike_window", "2")
    rows = train(recipe, tmp_path / "run", *other, "--run.steps", "24")
    # A new window has to fill before anything is skipped.
    assert [spike for *_, spike in rows[8:12]] == [0] * 4
    assert [spike for *_, spike in rows[16:18]] == [0] * 2
    assert len(train(recipe, tmp_path / "run", "--run.steps", "26")) == 26
