"""Commands that benchmarks start."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from benchmarks.lib.report import ROOT


def finish(
    command: Sequence[str], *, deadline: float | None = None, patience: float = 60, log: IO[bytes] | None = None
) -> int | None:
    """Run a command in the repository; Ctrl-C and SIGTERM of this process end it too.

    Args:
        command: words.
        deadline: moment of time.monotonic() at which it is stopped; None for none.
        patience: seconds between SIGTERM and SIGKILL.
        log: where its output goes; None for this process's own.

    Returns:
        Its exit status; None if it had to be stopped.
    """
    search = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
    )
    try:
        return process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it printed nothing")
