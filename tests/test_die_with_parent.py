"""What torchrun started ends with torchrun, by SIGTERM first; other processes do not."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from helpers.distributed import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in reads /proc")

# Starts its arguments as torchrun starts two ranks, and waits.
LAUNCHER = """
import os, subprocess, sys
own = {"TORCHELASTIC_RUN_ID": "none"} if sys.argv[1] == "torchrun" else {}
ranks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | own | {"RANK": str(rank)}, start_new_session=True)
    for rank in range(2)
]
[rank.wait() for rank in ranks]
"""
# Leaves at SIGTERM, or only notes that it came.
RANK = """
import os, signal, sys, time
from pathlib import Path
from motifarch.die_with_parent import die_with_launcher
folder, how, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
die_with_launcher()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0) if how == "leave" else (folder / f"told_{rank}").touch())
(folder / f"pid_{rank}").write_text(str(os.getpid()))
while True:
    time.sleep(1000)
"""


def alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Started:
    """A launcher and its two ranks."""

    def __init__(self, folder: Path, kind: str, how: str, *wrapper: str) -> None:
        command = [*wrapper, sys.executable, "-c", RANK, str(folder), how]
        self.launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, kind, *command])
        files = [folder / f"pid_{rank}" for rank in range(2)]
        wait_until(lambda: all(file.exists() and file.read_text() for file in files))
        self.ranks = [int(file.read_text()) for file in files]
        time.sleep(1)  # they look around for their siblings

    def end(self) -> None:
        self.launcher.kill()
        self.launcher.wait()

    def alive(self) -> list[int]:
        return [rank for rank in self.ranks if alive(rank)]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Started]]:
    processes: list[Started] = []
    yield processes
    for process in processes:
        process.end()
        for rank in process.alive():
            os.kill(rank, signal.SIGKILL)


@pytest.mark.parametrize("wrapper", [(), ("sh", "-c", '"$@"; exit $?', "sh")])
def test_ranks_get_sigterm_when_their_launcher_is_killed(
    tmp_path: Path, started: list[Started], wrapper: tuple[str, ...]
) -> None:
    started.append(run := Started(tmp_path, "torchrun", "leave", *wrapper))
    assert run.alive() == run.ranks
    run.end()
    wait_until(lambda: not run.alive())


@pytest.mark.slow
def test_one_that_does_not_leave_and_one_that_is_frozen_end_within_ten_seconds(
    tmp_path: Path, started: list[Started]
) -> None:
    started.append(run := Started(tmp_path, "torchrun", "stay"))
    os.kill(run.ranks[0], signal.SIGSTOP)
    run.end()
    killed = time.monotonic()
    wait_until(lambda: not run.alive())
    assert 5 < time.monotonic() - killed < 10  # there was time to save
    assert (tmp_path / "told_1").exists()


def test_others_are_left_alone(tmp_path: Path, started: list[Started]) -> None:
    started.append(run := Started(tmp_path, "nohup", "leave"))
    run.end()
    time.sleep(1.5)
    assert run.alive() == run.ranks


def test_a_rank_whose_launcher_was_gone_before_it_could_ask_ends_at_once() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    code = "from motifarch.die_with_parent import die_with_launcher; die_with_launcher()"
    env = os.environ | store | {"TORCHELASTIC_RUN_ID": "none"}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=False).returncode == 143
