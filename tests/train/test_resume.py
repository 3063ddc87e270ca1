"""Resuming continues the same run: bitwise on as many ranks, closely on another number."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import TIMEOUT, kill_tree, started, train, wait_until
from helpers.tiny import write_recipe
from motifarch.files import sha256
from motifarch.train.manifest import find_newest
from motifarch.train.run_folder import read_metrics

STALLED = Path(__file__).with_name("stalled_save.py")


def run(ranks: int, recipe: Path, output: Path, *overrides: str) -> str:
    """Trains and returns what was printed."""
    output.parent.mkdir(exist_ok=True)
    return train(ranks, output.parent, recipe, "--run.output", output, *overrides)


def losses(output: Path) -> list[tuple[int, Any]]:
    return [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The output of 40 steps on two ranks in float32, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(2, write_recipe(folder, data), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The output of a run that was given 20 steps."""
    folder = tmp_path_factory.mktemp("half")
    run(2, write_recipe(folder, data), folder / "run", "--run.steps", "20")
    return folder / "run"


def test_resume_is_bitwise_in_float32(recipe: Path, tmp_path: Path, whole: Path, half: Path) -> None:
    output = shutil.copytree(half, tmp_path / "resumed")
    assert "resuming after step 20" in run(2, recipe, output)
    assert [step for step, _ in losses(output)] == list(range(1, 41))
    assert losses(output) == losses(whole)
    record = json.loads((output / "run.json").read_text())
    assert record["parent"]["checkpoint"].endswith("step_00000020")
    assert record["parent"]["manifest_sha256"] == sha256(half / "checkpoints" / "step_00000020" / "manifest.json")
    assert [start["step"] for start in record["starts"]] == [0, 20]
    assert record["starts"][0]["parent"] is None


def test_other_cpu_kernels_are_told(recipe: Path, tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = shutil.copytree(half, tmp_path / "resumed")
    was = json.loads((output / "run.json").read_text())["cpu_kernels"]
    now = {"inductor": "eager", "eager": "inductor"}[was]
    environment = {"MOTIF_CPU_KERNELS": now}
    printed = train(2, tmp_path, recipe, "--run.output", output, "--run.steps", "21", environment=environment)
    assert f"MOTIF_CPU_KERNELS={was}" in " ".join(printed.split())
    assert json.loads((output / "run.json").read_text())["cpu_kernels"] == now


def test_resume_is_bitwise_in_bfloat16(recipe: Path, tmp_path: Path) -> None:
    precision = ("--precision.compute", "bfloat16")
    run(2, recipe, tmp_path / "whole", *precision)
    run(2, recipe, tmp_path / "parts", *precision, "--run.steps", "20")
    # The recipe's `auto` keeps what the run began with, whatever this machine is fastest in.
    printed = run(2, recipe, tmp_path / "parts", "--precision.compute", "auto")
    assert "bfloat16, resuming after step 20" in printed
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def assert_close(output: Path, expected: Path) -> None:
    ours, theirs = read_metrics(output / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl")
    assert [r["targets"] for r in ours] == [r["targets"] for r in theirs]
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], abs=1e-4)
    assert ours[-1]["validation_loss"] == pytest.approx(theirs[-1]["validation_loss"], abs=1e-4)


def test_one_rank_after_two(recipe: Path, tmp_path: Path, whole: Path, half: Path) -> None:
    output = shutil.copytree(half, tmp_path / "resumed")
    assert "1 rank on cpu, float32, resuming after step 20" in run(1, recipe, output)
    assert_close(output, whole)


def test_two_ranks_after_one(recipe: Path, tmp_path: Path, whole: Path) -> None:
    run(1, recipe, tmp_path / "run", "--run.steps", "20")
    assert "2 ranks on cpu, float32, resuming after step 20" in run(2, recipe, tmp_path / "run")
    assert_close(tmp_path / "run", whole)


def test_other_batches_go_on_with_the_next_samples(tmp_path: Path, finished_run: Path, data: Path) -> None:
    output = shutil.copytree(finished_run, tmp_path / "run")
    recipe = write_recipe(tmp_path, data)
    size = json.loads((output / "run.json").read_text())["recipe"]["batch"]["size"]
    printed = run(1, recipe, output, "--run.steps", "7", "--batch.size", str(2 * size), "--validation.every", "0")
    assert f"batch.size was {size}, is {2 * size}: the data goes on after the {6 * size} samples" in printed
    epochs = [row["epoch"][0] for row in read_metrics(output / "metrics.jsonl")]
    assert epochs[-1] / epochs[0] == pytest.approx(6 + 2)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(recipe: Path, tmp_path: Path, whole: Path) -> None:
    output = tmp_path / "killed"
    partial = output / "checkpoints" / "step_00000020.partial"
    with started(2, STALLED, recipe, "--run.output", str(output)) as process:
        # The save of step 20 has written its shards and hangs before its manifest.
        wait_until(lambda: bool(list(partial.glob("*.distcp"))), process)
        kill_tree(process.pid)
    warnings: list[str] = []
    newest = find_newest(output, warnings.append)
    assert newest is not None
    assert newest.name == "step_00000010"
    assert len(warnings) == 1
    assert str(partial) in warnings[0]
    assert "cut short" in warnings[0]

    printed = run(2, recipe, output)
    assert "passing over" in printed
    assert str(partial) in printed
    assert "resuming after step 10" in printed
    assert not partial.exists()
    assert losses(output) == losses(whole)


@pytest.mark.parametrize(
    ("ranks", "number"), [pytest.param(2, signal.SIGTERM, marks=pytest.mark.slow), (0, signal.SIGINT)]
)
def test_a_signal_saves_before_leaving(recipe: Path, tmp_path: Path, ranks: int, number: signal.Signals) -> None:
    output = tmp_path / "stopped"
    # Far more steps than can be done before the signal, and no checkpoint due on the way.
    long = ("--run.steps", "100000", "--checkpoint.every", "100000", "--run.output", str(output))
    with started(ranks, "-m", "motifarch.train", recipe, *long) as process:
        wait_until(lambda: len(losses(output)) >= 5, process)
        # Twice: a terminal and torchrun may both deliver it.
        process.send_signal(number)
        if not ranks:
            process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    if not ranks:
        assert process.returncode == 128 + number
    assert "the same command resumes" in out, out + err
    newest = find_newest(output)
    assert newest is not None
    rows = read_metrics(output / "metrics.jsonl")
    assert newest.name == f"step_{rows[-1]['step']:08d}"
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert (output / "loss.png").stat().st_size > 1000
