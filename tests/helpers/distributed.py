"""Runs the same thing on one process or several, as real processes with gloo."""

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TO_REPORT = ("--monitor-interval", "3")
"""For torchrun: after one rank's death, time for the others to say what they miss before it ends
them."""

TIMEOUT = 300
"""Seconds for one command, and without news of a condition: met by what hangs alone, for a slow
machine is no failure."""

RANKS_TIMEOUT = 400
"""Seconds for one call on several ranks, which may try many layouts."""


def torchrun_command(ranks: int, *args: str | Path) -> list[str]:
    """The command line of torchrun, by the interpreter that runs the tests."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, *map(str, args)]


def torchrun(ranks: int, *args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script (a path, or -m MODULE) on some ranks; 0 ranks means without torchrun."""
    with started(ranks, *args, cwd=cwd) as process:
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def started(ranks: int, *args: str | Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Starts the same without waiting; what still runs at the end is killed, all ranks of it."""
    command = torchrun_command(ranks, *args) if ranks else [sys.executable, *map(str, args)]
    options |= {"text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "start_new_session": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()


def kill_tree(pid: int) -> None:
    """SIGKILLs a process and all its descendants, which would keep its pipes open."""
    for victim in (pid, *descendants(pid)):
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return children + [grandchild for child in children for grandchild in descendants(child)]


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Waits for a condition; fails where the process has ended without it."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended first: {process.communicate()}")
        time.sleep(0.02)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> None:
    """Calls a module-level function on each rank, with torchrun's environment set."""
    # A store of this process's own: no port can be taken between choosing and using it.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    # Forked by a server that has imported what takes long, once for all tests.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["motifarch.train.loop"])
    given = (ranks, store.port, dict(os.environ), function, args)
    mp.start_processes(_call, args=given, nprocs=ranks, start_method="forkserver")


def train(ranks: int, folder: Path, *args: str | Path, environment: dict[str, str] | None = None) -> str:
    """What rank 0 prints of `motifarch train`, without torchrun, which takes long to start."""
    on_ranks(ranks, _train, folder, list(map(str, args)), environment or {})
    return (folder / "printed_by_0").read_text()


def _train(folder: Path, args: list[str], environment: dict[str, str]) -> None:
    from motifarch.train.main import main

    os.environ |= environment
    with (folder / f"printed_by_{os.environ['RANK']}").open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        assert main(args) == 0
        sys.stdout.flush()


def _call(
    rank: int, ranks: int, port: int, environment: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    faulthandler.dump_traceback_later(RANKS_TIMEOUT, exit=True)
    torch.set_num_threads(1)
    os.environ |= environment  # the server's own is of when it started
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    function(*args)
    # No tidy end: process groups that the function left open may wait for one another in it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
