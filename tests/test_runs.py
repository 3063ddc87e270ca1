"""`motifarch runs`: what it says of folders of runs."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from motifarch.commands.runs import main
from motifarch.errors import UserError
from motifarch.runs import differences, find_runs, summarise
from motifarch.train.plots import draw_loss
from motifarch.train.run_folder import LOCK, METRICS, RECORD, read_metrics

HOLDER = """
import sys
from pathlib import Path
from motifarch.locks import locked
with locked(Path(sys.argv[1]), str):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path, finished_run: Path) -> Path:
    """A run that finished, one of another learning rate that was stopped, one that crashed."""
    for name in ("whole", "sub/stopped", "crashed"):
        shutil.copytree(finished_run, tmp_path / name)
    change(tmp_path / "sub/stopped", ended="stopped", lr=0.5)
    change(tmp_path / "crashed", ended=None, lr=None)
    metrics = tmp_path / "crashed" / METRICS
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:3]))
    return tmp_path


def change(run: Path, *, ended: str | None, lr: float | None) -> None:
    record = json.loads((run / RECORD).read_text())
    record["ended"] = ended
    if lr is not None:
        record["recipe"]["optim"]["lr"] = lr
    (run / RECORD).write_text(json.dumps(record))


@pytest.fixture
def held(folder: Path) -> Iterator[Path]:
    """A run that another process is at work in."""
    command = [sys.executable, "-c", HOLDER, str(folder / "crashed" / LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield folder / "crashed"
        process.communicate()


def test_a_table_and_a_plot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert [rows[name][1] for name in ("whole", "sub/stopped", "crashed")] == ["complete", "stopped", "failed"]
    assert rows["crashed"][2] == "3/6"
    assert rows["optim.lr"][-1] == "0.5" or "0.5" in rows["optim.lr"]
    assert "run.output" not in printed
    assert (folder / "runs.png").read_bytes()[1:4] == b"PNG"


def test_a_run_may_have_any_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = (folder / "crashed").rename(folder / "[red]$_$")
    draw_loss(read_metrics(named / METRICS), named / "loss.png", named.name)
    assert main([str(folder)]) == 0
    assert "[red]$_$" in capsys.readouterr().out
    assert (folder / "runs.png").read_bytes()[1:4] == b"PNG"


def test_losses_are_means(folder: Path) -> None:
    rows = read_metrics(folder / "whole" / METRICS)
    summary = summarise(folder / "whole", "whole", last=4)
    assert summary.loss == pytest.approx(math.fsum(row["loss"] for row in rows[-4:]) / 4)
    assert summary.bits_per_byte is not None
    assert summary.tokens == summary.curve[-1][0] == rows[-1]["targets"]
    assert summary.parameters
    assert summary.parameters > 1000


def test_a_run_at_work(held: Path) -> None:
    assert summarise(held, "it").state == "running"


def test_what_is_the_same_is_not_told(folder: Path) -> None:
    found = [summarise(run, run.name) for run in find_runs(folder)]
    assert set(differences(found)) == {"optim.lr"}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        main([str(tmp_path)])
