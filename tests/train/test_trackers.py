"""Experiment trackers: the real packages, without a network, where they are installed."""

import contextlib
import importlib
import json
import os
import sqlite3
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.distributed import wait_until
from motifarch.cli import main
from motifarch.errors import UserError
from motifarch.train.main import main as train
from motifarch.train.recipe import LogSection
from motifarch.train.trackers import open_trackers

ROWS = [{"step": step, "loss": 1.0 / step, "lambda": [0.25, 0.5]} for step in (1, 2, 3)]


def follow(tracker: Any, output: Path) -> None:
    output.mkdir()
    log = LogSection(tensorboard=False, tracker=tracker, project="followed")
    (opened,) = open_trackers(log, output, start_step=0, recipe={"run": {"steps": 3}})
    for row in ROWS:
        opened.log(row)
    opened.close()


def test_one_that_is_missing_is_one_message(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("motifarch.train.trackers.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["train", str(recipe), "--log.tracker", "wandb"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'motifarch[wandb]'" in error
    assert not (recipe.parent / "run").exists()


def test_wandb_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb")
    follow("wandb", tmp_path / "run")
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    # wandb's own process writes the file, and on a busy machine is behind.
    wait_until(lambda: b"lambda/1" in file.read_bytes())
    content = file.read_bytes()
    assert b"followed" in content
    assert capsys.readouterr().out == ""


def test_trackio_local(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    follow("trackio", tmp_path / "run")
    assert capsys.readouterr().out == ""
    with contextlib.closing(sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "followed.db")) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [("run", 1), ("run", 2), ("run", 3)]
    assert json.loads(rows[1][2]) == {"loss": 0.5, "lambda/0": 0.25, "lambda/1": 0.5}


def test_a_run_hands_every_step_to_its_tracker(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that has wandb's and trackio's calls."""
    stand_in: Any = ModuleType("trackio")
    logged: list[tuple[int, dict[str, float]]] = []
    stand_in.log = lambda values, step: logged.append((step, values))
    stand_in.finish = lambda: logged.append((-1, {}))
    given: dict[str, Any] = {}
    stand_in.init = lambda **options: given.update(options) or stand_in
    stand_in.__spec__ = importlib.machinery.ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    options = ("--run.steps", "3", "--validation.every", "0", "--optim.warmup_steps", "1")
    assert train([str(recipe), "--log.tracker", "trackio", *options]) == 0
    assert [step for step, _ in logged] == [1, 2, 3, -1]
    assert logged[0][1]["loss"] > logged[2][1]["loss"] > 0
    assert given["project"] == "motifarch"
    assert given["config"]["run"]["steps"] == 3


def test_one_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in: Any = ModuleType("wandb")

    def refuse(**options: Any) -> None:
        raise RuntimeError("no account")

    stand_in.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(UserError, match=r"log.tracker is wandb, which can't start: no account"):
        follow("wandb", tmp_path / "run")
