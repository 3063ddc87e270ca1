"""Runs the same thing on one process or several, as real processes with gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

TIMEOUT = 120


def torchrun_command(ranks: int, *args: str | Path) -> list[str]:
    """The command line of torchrun, by the interpreter that runs the tests."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, *map(str, args)]


def torchrun(ranks: int, *args: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a script (a path, or -m MODULE) on some ranks and waits for it; 0 ranks means without torchrun."""
    with started(ranks, *args, cwd=cwd) as process:
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def started(ranks: int, *args: str | Path, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Starts the same without waiting; what still runs at the end is killed, all ranks of it."""
    command = torchrun_command(ranks, *args) if ranks else [sys.executable, *map(str, args)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()


def kill_tree(pid: int) -> None:
    """SIGKILLs a process and its children at once, as a lost machine would."""
    children = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    for victim in (pid, *children):
        os.kill(victim, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Waits for a condition; fails when the process that should bring it about has ended without it."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"the process ended first: {process.communicate()}")
        time.sleep(0.02)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> None:
    """Calls a module-level function on each rank, with torchrun's environment set; fails where any rank does."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    mp.spawn(_call, args=(ranks, port, function, args), nprocs=ranks)


def _call(rank: int, ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    function(*args)
