"""Progress on a terminal, and nothing elsewhere."""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from typing import TypeVar, cast

import multiprocess  # type: ignore[import-untyped]  # what datasets forks with
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, track

T = TypeVar("T")

_counted = multiprocess.Value("q", 0)  # inherited by forked processes, and so one for all


@contextmanager
def bar(items: Iterable[T], description: str, total: int | None = None) -> Iterator[Iterable[T]]:
    """The items again, whose number (of ``total``) a line shows that vanishes at the end.

    A thread draws the bar. It ends with this context, also when items are left over after an
    error: Python 3.13, ending with it alive, would wait for it forever.
    """
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield items
        return
    tracked = track(items, description, total=total, console=console, transient=True)
    with closing(cast(Generator[T, None, None], tracked)):
        yield tracked


def spinner(description: str) -> AbstractContextManager[object]:
    """Shown within, where it is not known how much there is to do."""
    return Console(file=sys.stderr).status(description)


@contextmanager
def counted_bar(description: str, total: int) -> Iterator[None]:
    """Within, a bar shows what `count` was given, in this process and in those that it forks."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield
        return
    _counted.value = 0

    class Counted(Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            for task in self.task_ids:
                self.update(task, completed=_counted.value)
            return super().get_renderables()

    progress = Counted(console=console, transient=True)
    progress.add_task(description, total=total)
    with progress:
        yield


def count(items: int) -> None:
    """Moves the bar of `counted_bar` on."""
    with _counted.get_lock():
        _counted.value += items


@contextmanager
def characters_bar(description: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Within, a line shows the characters that what it gives was called with."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda characters: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,} characters"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda characters: progress.advance(task, characters)
