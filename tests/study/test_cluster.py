"""A study as jobs of a cluster: SLURM itself, where it is installed, and submitit's stand-in."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import TIMEOUT, wait_until
from helpers.slurm import INSTALLED, slurm_cluster
from helpers.tiny import prepare_text
from helpers.tiny_study import command, write_grid
from motifarch.errors import UserError
from motifarch.study.main import main
from motifarch.train.main import main as train
from motifarch.train.run_folder import read_metrics

SLURM = "{cluster: slurm, gpus_per_node: 0, timeout_min: 30}"
RUNS = [Path(f"runs/tiny/{name}/seed_0") for name in ("softmax_gqa_poly_norm", "gda_2to1_poly_norm")]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path / "slurm") as found:
        yield found | {"OMP_NUM_THREADS": "1"}


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r.get("validation_loss")) for r in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.nightly
@pytest.mark.skipif(not INSTALLED, reason="SLURM's daemons (slurm-wlm, munge) are not installed, or this is not root")
def test_on_slurm_a_preempted_run_is_queued_again_and_a_killed_study_takes_its_jobs_up(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    data, out = prepare_text(tmp_path), tmp_path / "out"
    grid = write_grid(tmp_path, data, tokens=51200)
    options = ("--submitit", SLURM, "--jobs", "2")
    first, second = (out / run for run in RUNS)

    def start() -> subprocess.Popen[str]:
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command(grid, out, *options), env=environment, **piped)  # type: ignore[call-overload,no-any-return]

    def steps(run: Path) -> int:
        return len(read_metrics(run / "metrics.jsonl"))

    process = start()
    wait_until(lambda: steps(first) > 5, process)
    # What SLURM sends before it takes a node away, by way of submitit.
    job = (first / "train.job").read_text()
    subprocess.run(["scancel", job, "--signal", "USR2"], env=environment, check=True)

    def is_queued_again() -> bool:
        asked = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
        return "PENDING" in subprocess.run(asked, env=environment, capture_output=True, text=True).stdout

    wait_until(is_queued_again, process)
    # SLURM would wait two minutes with it.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], env=environment, check=True)

    def is_resumed() -> bool:
        return len(json.loads((first / "run.json").read_text())["starts"]) == 2

    wait_until(is_resumed, process)
    # The study itself is killed, without a word: its jobs go on.
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = {run: (run / "train.job").read_text() for run in (first, second) if (run / "train.job").exists()}
    assert first in before

    printed, _ = start().communicate(timeout=600)
    assert "2 of 2 runs done" in printed, printed
    for run in (first, second):
        assert json.loads((run / "result.json").read_text())["validation_loss"] > 0
        starts = json.loads((run / "run.json").read_text())["starts"]
        assert len(starts) == (2 if run == first else 1)  # taken up, not started anew
        assert not list(run.glob("*.job"))
        assert train([str(run / "recipe.yaml"), "--run.output", str(tmp_path / run.parent.name)]) == 0
        assert losses(run) == losses(tmp_path / run.parent.name)


@pytest.mark.nightly
def test_jobs_do_what_processes_do_and_a_stopped_study_cancels_them(tmp_path: Path) -> None:
    data, out = prepare_text(tmp_path), tmp_path / "out"
    grid = write_grid(tmp_path, data, tokens=12800)
    options = ("--submitit", "{cluster: local, gpus_per_node: 0, timeout_min: 30}", "--jobs", "1")
    process = subprocess.Popen(
        command(grid, out, *options), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_until(lambda: len(read_metrics(out / RUNS[0] / "metrics.jsonl")) > 5, process)
    process.terminate()
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "The same command goes on" in printed
    assert main([str(grid), "--output", str(out), *options]) == 0
    starts = json.loads((out / RUNS[0] / "run.json").read_text())["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]  # it had saved


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{cluster: local, slurm_partitions: gpu}", r"--submitit is .*partitions.*AutoExecutor"),
        ("{cluster: nowhere}", r"--submitit is .*nowhere"),
        ("gpu", r"--submitit is 'gpu'; give a mapping"),
    ],
)
def test_options_that_submitit_does_not_know_are_refused(options: str, message: str, tmp_path: Path) -> None:
    grid = write_grid(tmp_path, prepare_text(tmp_path))
    with pytest.raises(UserError, match=message):
        main([str(grid), "--output", str(tmp_path / "out"), "--submitit", options])
