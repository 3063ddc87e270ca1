"""A rank that dies or hangs: what is reported, and torchrun's restart."""

from pathlib import Path
from typing import Any

import pytest

from helpers.distributed import TO_REPORT, torchrun, train
from helpers.tiny import write_recipe
from motifarch.train.run_folder import read_metrics

TROUBLE = Path(__file__).with_name("trouble_once.py")
LENGTH = ("--run.steps", "24", "--checkpoint.every", "8", "--log.every", "2")
PATIENCE = ("--distributed.timeout_s", "3", "--distributed.timeout_first_s", "60")


def losses(output: Path) -> list[tuple[int, Any, Any]]:
    rows = read_metrics(output / "metrics.jsonl")
    return [(row["step"], row["loss"], row.get("validation_loss")) for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[tuple[int, Any, Any]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, folder, write_recipe(folder, data), *LENGTH)
    assert not (folder / "run" / "stacks").exists()
    return losses(folder / "run")


@pytest.mark.slow
def test_a_killed_and_a_hung_rank_are_restarted_and_the_run_goes_on(
    recipe: Path, tmp_path: Path, undisturbed: list[tuple[int, Any, Any]]
) -> None:
    troubles = (*TO_REPORT, "--max-restarts", "2", TROUBLE, tmp_path, "kill:11,hang:19")
    # A save in the background may not be complete when the rank is killed.
    done = torchrun(2, *troubles, recipe, *LENGTH, *PATIENCE, "--checkpoint.asynchronous", "false")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "had_trouble_at_11").exists()
    assert "resuming after step 8" in done.stdout
    assert "resuming after step 16" in done.stdout
    assert losses(tmp_path / "run") == undisturbed

    # The killed one is missed by the other; the hung one is named, with where it stands.
    stacks = tmp_path / "run" / "stacks"
    lost, hung = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "lost another rank" in lost
    for words in ("rank 1 never arrived at step 20", "last seen at the data of step 20", str(stacks / "rank_1.txt")):
        assert words in hung
    assert "sleep_for_ever" in (stacks / "rank_1.txt").read_text()
    # The other one waited for it, in the sum over all ranks.
    waited = (stacks / "rank_0.txt").read_text()
    assert "launch.py" in waited
    assert "in all_reduce_sum" in waited


def test_without_restarts_torchrun_ends_with_the_report(recipe: Path, tmp_path: Path) -> None:
    done = torchrun(2, TROUBLE, tmp_path, "hang:3", recipe, *LENGTH, *PATIENCE)
    assert done.returncode != 0
    assert "rank 1 never arrived at step 4" in done.stderr.rpartition("Root Cause")[2]
