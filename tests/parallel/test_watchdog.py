"""What the watchdog says of the ranks, and that it lets go of runs that go on."""

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

    with open_world() as world, Watchdog(world, Path(sys.argv[1]), first_s=60, limit_s=0.5) as watchdog:
        watchdog.heartbeat("step 1")
        watchdog.first_step_done()
        watchdog.heartbeat("a checkpoint", no_timeout=True)
        time.sleep(2)
        watchdog.heartbeat("step 2")
        stuck()
"""


def test_a_hung_run_ends_and_long_work_does_not_end_it(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="every rank arrived at step 2 and none got past it"):
        run_python(ALONE, tmp_path)
    stack = (tmp_path / "stacks" / "rank_0.txt").read_text()
    assert "rank 0 at step 2" in stack
    assert "in stuck" in stack


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
