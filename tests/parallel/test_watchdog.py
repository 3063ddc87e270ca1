"""What the watchdog says of the ranks, and that it lets go of runs that go on."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from helpers.python_process import run_python
from motifarch.parallel import Watchdog, open_world
from motifarch.parallel.watchdog import limit_collectives

ALONE = """
    import sys, time
    from pathlib import Path
    from motifarch.parallel import Watchdog, open_world

    def stuck():
        time.sleep(60)

    with open_world() as world, Watchdog(world, Path(sys.argv[1]), first_s=60, limit_s=0.3) as watchdog:
        watchdog.heartbeat("step 1")
        watchdog.first_step_done()
        watchdog.heartbeat("step 2")
        stuck()
"""


def test_a_run_of_one_process_ends_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="every rank arrived at step 2 and none got past it"):
        run_python(ALONE, tmp_path)
    stack = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "rank 0 at step 2" in stack
    assert "in stuck" in stack


def test_the_first_step_and_work_without_a_timeout_may_take_longer(tmp_path: Path) -> None:
    def allowed(doing: str, **options: bool) -> float:
        """Whole seconds until the deadline."""
        before = time.monotonic()
        watchdog.heartbeat(doing, **options)
        return round(watchdog._deadline - before, -1)

    with open_world() as world:
        watchdog = Watchdog(world, tmp_path, first_s=5000, limit_s=1000)
        assert allowed("step 1") == 5000
        watchdog.first_step_done()
        assert allowed("step 2") == 1000
        assert allowed("the checkpoint of step 2", no_timeout=True) == 5000
        assert allowed("step 3") == 1000
        with watchdog:
            pass
    assert not (tmp_path / "stacks").exists()


def timeout_s(group: dist.ProcessGroup) -> float:
    (backend,) = {group._get_backend(device) for device in group._device_types}
    return backend.options._timeout.total_seconds()  # type: ignore[no-any-return]


def test_collectives_wait_long_first_and_short_later(tmp_path: Path) -> None:
    with open_world(1000) as world:
        kept = dist.new_group(backend="gloo")
        default = distributed_c10d._get_default_group()
        with Watchdog(world, tmp_path, first_s=100, limit_s=10) as watchdog:
            assert [timeout_s(g) for g in (default, world.control, kept)] == [160.0] * 3
            watchdog.first_step_done(keep=[kept])
            assert [timeout_s(g) for g in (default, world.control, kept)] == [25.0, 25.0, 160.0]
        limit_collectives(20)
        assert timeout_s(kept) == 40.0


def test_the_late_ranks_are_named(tmp_path: Path) -> None:
    with open_world() as world:
        watchdog = Watchdog(dataclasses.replace(world, size=12), tmp_path, first_s=60, limit_s=60)
    everyone = set(range(12))
    doing = dict.fromkeys(everyone, (7, "step 3"))
    stacks = tmp_path / "stacks"
    text = watchdog._describe("late", doing | {5: (6, "the data of step 3")}, everyone)
    assert "rank 5 never arrived at step 3 (last seen at the data of step 3)" in text
    assert f"stacks: {stacks / 'rank_5.txt'}; those of the others" in text
    # One that is gone has left neither a note nor a stack.
    text = watchdog._describe("late", {r: d for r, d in doing.items() if r != 5}, everyone - {5})
    assert "rank 5 never arrived at step 3 (last seen at nothing)" in text
    assert "could not write its stacks" in text
    text = watchdog._describe("late", doing | dict.fromkeys(range(1, 12), (2, "step 1")), everyone)
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more never arrived at step 3" in text


def test_one_rank_of_a_node_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_world() as world:
        watchdog = Watchdog(dataclasses.replace(world, rank=6, size=12), tmp_path, first_s=60, limit_s=60)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert watchdog._speaker({0, 4, 5, 6, 7, 8}) == 4
    # The lowest of ranks 4 to 7 that could write.
    assert watchdog._speaker({0, 5, 6, 7, 8}) == 5
