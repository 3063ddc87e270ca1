"""One run in a folder at a time, which any signal that a cluster sends stops with a save."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import descendants, kill_tree, started, wait_until
from motifarch.data import BatchLoader
from motifarch.errors import UserError
from motifarch.train import main as training
from motifarch.train.main import main
from motifarch.train.manifest import find_newest
from motifarch.train.run_folder import LOCK, read_metrics
from motifarch.train.stop import SIGNALS

LONG = ("--run.steps", "100000", "--checkpoint.every", "100000", "--validation.every", "0")
HOLDER = """
import sys
from pathlib import Path
from motifarch.locks import locked
with locked(Path(sys.argv[1]), str):
    print("held", flush=True)
    sys.stdin.read()
"""


def steps(output: Path) -> list[int]:
    return [row["step"] for row in read_metrics(output / "metrics.jsonl")]


def send_at_step(monkeypatch: pytest.MonkeyPatch, number: int, at: int) -> None:
    read = BatchLoader.micro_batches

    def send(loader: BatchLoader, step: int) -> Any:
        if step == at:
            os.kill(os.getpid(), number)
        return read(loader, step)

    monkeypatch.setattr(BatchLoader, "micro_batches", send)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_every_signal_saves_before_leaving(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    send_at_step(monkeypatch, number, at=3)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP would be ignored
    try:
        assert main([str(recipe), *LONG]) == 128 + number
    finally:
        signal.signal(number, before)
    newest = find_newest(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step_{steps(tmp_path / 'run')[-1]:08d}"


def test_nohup_is_respected(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    send_at_step(monkeypatch, signal.SIGHUP, at=3)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main([str(recipe), "--run.steps", "8", "--validation.every", "0"]) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps(tmp_path / "run") == list(range(1, 9))


def test_a_second_start_is_refused_by_name(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOCK_PATIENCE_S", 0.5)
    output = tmp_path / "run"
    output.mkdir()
    command = [sys.executable, "-c", HOLDER, str(output / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline()
        with pytest.raises(UserError, match=rf"run\.output is {output}, .*pid {other.pid} on \S+, since 20"):
            main([str(recipe)])
        other.kill()
    assert [path.name for path in output.iterdir()] == [LOCK]
    assert main([str(recipe), "--run.steps", "8", "--validation.every", "0"]) == 0


@pytest.mark.slow
def test_without_its_launcher_a_run_saves_and_makes_way(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with started(2, "-m", "motifarch.train", recipe, *LONG) as first:
        wait_until(lambda: len(steps(output)) >= 5, first)
        ranks = descendants(first.pid)
        first.kill()
        # Started at once, beside ranks that are still saving.
        with started(2, "-m", "motifarch.train", recipe, *LONG) as second:
            wait_until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), second)
            saved = find_newest(output)
            assert saved is not None
            wait_until(lambda: len(json.loads((output / "run.json").read_text())["starts"]) == 2, second)
            assert json.loads((output / "run.json").read_text())["parent"]["checkpoint"] == str(saved)
            kill_tree(second.pid)
    assert steps(output) == list(range(1, len(steps(output)) + 1))


@pytest.mark.nightly
def test_of_three_simultaneous_starts_one_trains(recipe: Path, tmp_path: Path) -> None:
    length = ("--run.steps", "1200", "--checkpoint.every", "500", "--validation.every", "0")
    command = ("-m", "motifarch.train", recipe, *length)
    with started(2, *command) as one, started(2, *command) as two, started(2, *command) as three:
        ended = [process.communicate(timeout=300)[1] for process in (one, two, three)]
        statuses = [process.returncode for process in (one, two, three)]
    assert sorted(statuses) == [0, 1, 1]
    for status, err in zip(statuses, ended, strict=True):
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(errors) == (status != 0)
        assert all("another start of a run is at work" in line for line in errors)
    assert steps(tmp_path / "run") == list(range(1, 1201))
