"""Ends a process with the one that started it: a rank with torchrun, a run with its study.

A run that outlived its launcher would go on writing into a folder that the next start resumes.
Both get SIGTERM, at which training saves first. ``python die_with_parent.py PARENT COMMAND ...``
runs a command so, without importing the package around this file and torch with it.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

GRACE_S = 7.0
"""Seconds that a rank has to save after its launcher has gone."""

_libc = ctypes.CDLL(None)  # here: a forked process had better not load libraries
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_POLL_S = 0.5


def signal_at_parents_death(number: int) -> None:
    """Asks the kernel for a signal when the thread that started this process ends (on Linux)."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, number)


def die_with_launcher() -> None:
    """Ends a process that torchrun started with torchrun, however that ends; leaves others alone.

    Beside the kernel's signal a thread watches: torchrun may have started a script around this
    process, and what does not answer SIGTERM in time is ended from inside.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    signal_at_parents_death(signal.SIGTERM)
    child, launcher = _find_launcher()
    if not _launcher_answers():
        sys.exit(128 + signal.SIGTERM)  # it was gone before the signal was asked for
    threading.Thread(target=_watch, args=(child, launcher), daemon=True, name="launcher").start()


def _find_launcher() -> tuple[int, int]:
    """The nearest ancestor without torchrun's variables, after its child on the way to here."""
    child = os.getpid()
    while True:
        parent = _parent(child)
        try:
            if b"TORCHELASTIC_RUN_ID=" not in Path(f"/proc/{parent}/environ").read_bytes():
                return child, parent
        except OSError:  # another user's, or no Linux
            return child, parent
        child = parent


def _parent(pid: int) -> int:
    if pid == os.getpid():
        return os.getppid()
    try:
        # The name, in brackets, may hold anything.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _launcher_answers() -> bool:
    """Whether torchrun's store, which it opens before it starts a process, can be reached."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    for _ in range(3):
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=5).close()
            return True
        except ConnectionRefusedError:
            time.sleep(0.5)
        except OSError:  # slow, or a name that torch will resolve otherwise
            return True
    return False


def _watch(child: int, launcher: int) -> None:
    siblings: set[int] = set()
    while _parent(child) == launcher:
        siblings |= _children(launcher)
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    # One that is frozen can't end itself. torchrun has given each a session of its own.
    for sibling in siblings - {child}:
        if 0 != _parent(sibling) == _parent(child):
            with contextlib.suppress(OSError):
                os.killpg(sibling, signal.SIGKILL)
    os._exit(128 + signal.SIGTERM)


def _children(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(OSError):  # no Linux, or built without these files
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            found |= set(map(int, path.read_text().split()))
    return found


def main() -> None:
    """Asks to be ended with the parent, whose id comes first, and becomes the command."""
    parent, *command = sys.argv[1:]
    signal_at_parents_death(signal.SIGTERM)
    if sys.platform == "linux" and os.getppid() != int(parent):
        sys.exit(128 + signal.SIGTERM)  # it was gone before this was asked for
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
