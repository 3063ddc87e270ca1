"""A study's folder: it belongs to one grid, to one process at a time, and keeps what was decided
once.
"""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from motifarch.errors import UserError
from motifarch.files import write_json
from motifarch.study.grid import Grid

STUDY, RESULTS = "study.json", "results.json"
KIND, FORMAT = "head_ratio_study", 1
_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None], patience_s: float = 60.0) -> Iterator[int]:
    """Keeps other studies out of a folder.

    The lock is passed on to the runs' processes (flock's outlive the process that took them), so
    that those of a study that was killed are waited for: they end by themselves, see
    `motifarch.study.tied`.

    Args:
        folder: the study's, made if need be.
        say: told that others are waited for.
        patience_s: how long, in seconds.

    Yields:
        The lock's file descriptor, for the processes to inherit.

    Raises:
        UserError: another study is at work there, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise UserError(f"--output is {folder}, which can't be written: {error.strerror}; give another one") from None
    with file:
        deadline, told = time.monotonic() + patience_s, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is at work in {folder}; wait until it ends, or give another --output"
                    ) from None
                if not told:
                    say(f"waiting for the processes that are still at work in {folder}")
                    told = True
                time.sleep(0.2)
        yield file.fileno()


class StudyFolder:
    """`study.json`: the grid that the folder belongs to, and what was decided for all of its
    runs.
    """

    def __init__(self, path: Path, grid: Grid) -> None:
        """Opens the folder for a grid.

        Raises:
            UserError: it belongs to another grid.
        """
        self.path = path
        # As JSON has it: tuples are lists there.
        self.grid: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(grid)))
        self.content: dict[str, Any] = {"kind": KIND, "format": FORMAT, "grid": self.grid}
        try:
            text = (path / STUDY).read_text(encoding="utf-8")
        except FileNotFoundError:
            return
        try:
            self.content = json.loads(text)
            before = self.content["grid"]
            if before.get("match") == "operations":  # its former name
                before["match"] = "flops"
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path / STUDY} is damaged; give another --output, or delete that folder") from None
        if changed := list(_differences(before, self.grid)):
            shown = "; ".join(f"{name} is {now!r}, was {was!r}" for name, was, now in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{path} holds a study of another grid: {shown}{more}. Give this one an --output of its own, or the "
                "former grid again"
            )

    def decide(self, name: str, make: Callable[[], Any]) -> Any:
        """What was decided under a name, or is now, once for all starts."""
        if name not in self.content:
            self.note(name, make())
        return self.content[name]

    def note(self, name: str, value: Any) -> None:
        """Writes a value under a name."""
        self.content[name] = value
        write_json(self.path / STUDY, self.content)


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, before, after) of each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in [*before, *(k for k in after if k not in before)]:
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (was, now) in enumerate(zip(before, after, strict=True)):
            yield from _differences(was, now, f"{prefix}[{i}]")
    elif before != after:
        yield prefix, before, after
