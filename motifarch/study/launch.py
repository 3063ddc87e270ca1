"""Where a study's processes run: on this machine, each with its parent."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from motifarch import die_with_parent

T = TypeVar("T")
# As a script, which does not import the package around it and torch with it.
_DIE_WITH_PARENT = Path(die_with_parent.__file__)


def with_parent(command: Sequence[str]) -> list[str]:
    """A command that gets SIGTERM when this process ends, however that ends."""
    return [sys.executable, "-P", str(_DIE_WITH_PARENT), str(os.getpid()), *command]


class Process(Protocol):
    """One that was started: those of `subprocess.Popen` that a study needs."""

    def poll(self) -> int | None:
        """Its exit status; None while it runs."""

    def terminate(self) -> None:
        """Asks it to save and end."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end.

        Raises:
            subprocess.TimeoutExpired: it goes on after so many seconds.
        """

    def kill(self) -> None:
        """Ends it."""


class Launcher(Protocol):
    """Starts processes somewhere."""

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str], ranks: int) -> Process:
        """Starts a command.

        Args:
            command: program and arguments.
            log: where its output is appended.
            environment: variables besides those that are set.
            ranks: GPUs that it takes, where there are any.
        """

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What a function gives where the processes run."""


class LocalLauncher:
    """On this machine; a process ends with this one.

    Args:
        lock: a file descriptor that the processes inherit, and so hold what it locks.
    """

    def __init__(self, lock: int) -> None:
        self._lock = lock

    def start(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], ranks: int
    ) -> subprocess.Popen[bytes]:
        """As the protocol says."""
        with log.open("ab") as file:
            return subprocess.Popen(
                with_parent(command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                pass_fds=(self._lock,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """As the protocol says: here."""
        return function(*arguments)
