"""What the watchdog says of the ranks, and that it lets go of runs that go on."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

from helpers.distributed import descendants, kill_tree, on_ranks, started, wait_until
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


# Holds the interpreter's lock in native code: no thread of Python's can run.
STUCK = """
    import ctypes, sys
    from pathlib import Path
    from motifarch.parallel import Watchdog, open_world

    with open_world() as world, Watchdog(world, Path(sys.argv[1]), first_s=60, limit_s=1) as watchdog:
        watchdog.first_step_done()
        watchdog.heartbeat("step 2")
        __import__("time").sleep(0.5)
        ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.slow
def test_a_rank_that_lets_no_thread_run_ends_too(tmp_path: Path) -> None:
    before = time.monotonic()
    with pytest.raises(AssertionError, match=r"Timeout \((.|\n)*most recent call first"):
        run_python(STUCK, tmp_path)
    assert time.monotonic() - before < 50


def _late_out_of_long_work(folder: Path) -> None:
    with open_world(60) as world, Watchdog(world, folder, first_s=60, limit_s=1) as watchdog:
        watchdog.first_step_done()
        with watchdog.long_work("a checkpoint"):
            time.sleep(3 * world.rank)
        watchdog.heartbeat("the next step")
        world.all_reduce_sum([1])


def test_who_is_through_with_long_work_does_not_give_the_others_up(tmp_path: Path) -> None:
    on_ranks(2, _late_out_of_long_work, tmp_path)
    assert not (tmp_path / "stacks").exists()


@pytest.mark.slow
def test_ranks_end_by_their_own_clocks_where_the_store_is_frozen(recipe: Path, tmp_path: Path) -> None:
    limits = ("--distributed.timeout_s", "5", "--distributed.timeout_first_s", "60")
    metrics = tmp_path / "run" / "metrics.jsonl"
    long = ("--run.steps", "100000", "--checkpoint.every", "100000", *limits)
    with started(2, "-m", "motifarch.train", recipe, *long) as launcher:
        wait_until(metrics.exists, launcher)
        wait_until(lambda: len(metrics.read_text().splitlines()) >= 5, launcher)
        first, second = sorted(descendants(launcher.pid), key=_rank)
        os.kill(first, signal.SIGSTOP)
        launcher.send_signal(signal.SIGSTOP)
        frozen = time.monotonic()
        wait_until(lambda: Path(f"/proc/{second}/stat").read_text().rpartition(")")[2].split()[0] == "Z", launcher)
        assert time.monotonic() - frozen < 20
        kill_tree(launcher.pid)
        _, err = launcher.communicate()
    said = next(line for line in err.splitlines() if line.startswith("error: "))
    assert "rank 1 is at step" in said
    assert "rank 0 did not answer" in said
    assert "motifarch/train/loop.py" in (tmp_path / "run" / "stacks" / "rank_1.txt").read_text()


def _rank(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(v.removeprefix(b"RANK=")) for v in variables if v.startswith(b"RANK="))


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
