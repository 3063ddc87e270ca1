"""One style of progress on a terminal, and nothing elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import multiprocess  # type: ignore[import-untyped]  # what datasets forks with
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class Advance(Protocol):
    """Moves the line on."""

    def __call__(self, things: int = 1) -> None: ...


_done = multiprocess.Value("q", 0)  # inherited by forked processes, and so one for all
_is_shown = False


@contextmanager
def progress(description: str, total: int | None = None, *, of: str = "", shown: bool = True) -> Iterator["Advance"]:
    """Within, a line shows what is done of ``total``, or only how much, unless ``shown`` is false;
    it vanishes at the end.

    Gives the function that moves it on by a number of things. That may be called, and pickled, in
    this process and in those that it forks. Of two within each other the outer one is shown.

    A thread draws the line. It ends with this context, also after an error: Python 3.13, ending
    with it alive, would wait for it forever.
    """
    global _is_shown
    console = Console(file=sys.stderr)
    if _is_shown or not shown or not console.is_terminal:
        yield _nothing
        return
    _done.value = 0
    # Redirected, what goes to standard output would appear beside the line, past any > and |.
    line = _Line(*_columns(total, of), console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    line.add_task(description, total=total)
    _is_shown = True
    try:
        with line:
            yield _advance
    finally:
        _is_shown = False


class _Line(Progress):
    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.task_ids:
            self.update(task, completed=_done.value)
        return super().get_renderables()


class _Number(ProgressColumn):
    """How many are done, of how many where that is known, and of what."""

    def __init__(self, of: str) -> None:
        super().__init__()
        self._of = of

    def render(self, task: Task) -> Text:
        total = "" if task.total is None else f"/{int(task.total):,}"
        return Text(f"{int(task.completed):,}{total} {self._of}" if task.completed or total else "")


def _columns(total: int | None, of: str) -> list[ProgressColumn]:
    what: list[ProgressColumn] = [SpinnerColumn(), TextColumn("{task.description}")]
    if total is None:
        return [*what, _Number(of), TimeElapsedColumn()]
    return [*what, BarColumn(), TaskProgressColumn(), _Number(of), TimeElapsedColumn(), TimeRemainingColumn()]


def _advance(things: int = 1) -> None:
    with _done.get_lock():
        _done.value += things


def _nothing(things: int = 1) -> None:
    """Where nothing is shown."""
