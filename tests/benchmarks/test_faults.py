"""Kills and damages of a run, in smaller numbers than `python -m benchmarks.faults` tries."""

from pathlib import Path

import pytest

from benchmarks.faults.damages import Damaging
from benchmarks.faults.kills import Killing
from benchmarks.faults.pickles import try_pickles

pytestmark = pytest.mark.nightly


def test_nothing_is_lost_by_kills(tmp_path: Path) -> None:
    found = Killing(tmp_path / "kills", seed=1, torchrun_every=12).run(20, print)
    assert found["faults"] == []
    assert found["counts"]["kills"] == 20
    assert found["counts"]["kills during a save"] >= 7


def test_nothing_is_lost_by_damages(tmp_path: Path) -> None:
    found = Damaging(tmp_path / "damages", seed=1).run(2, print)
    assert found["faults"] == []
    assert found["counts"]["damages"] == 2 * found["files"] >= 30


def test_a_checkpoint_that_is_code_is_refused(tmp_path: Path) -> None:
    assert try_pickles(tmp_path / "pickles")["faults"] == []
