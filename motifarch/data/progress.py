"""A progress bar on a terminal, and nothing elsewhere."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def bar(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Pass items on, showing their number (of ``total``) in a line that vanishes at the end."""
    console = Console(file=sys.stderr)
    return track(items, description, total=total, console=console, transient=True, disable=not console.is_terminal)
