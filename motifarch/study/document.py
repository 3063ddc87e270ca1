"""A report before it is HTML or Markdown: sections of paragraphs, lists, tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    note: bool = False
    """Whether it is an aside: an explanation of what stands above it."""


@dataclass(frozen=True)
class Items:
    """A list of statements."""

    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    """Lines to be read or typed as they are."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows under headings."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1
    """That many first columns are words, aligned left; the first names its row."""
    strong: frozenset[int] = frozenset()
    """Rows to be set off."""


@dataclass(frozen=True)
class Picture:
    """A drawing with words for who cannot see it."""

    title: str
    description: str
    """What it shows, figures included."""
    note: str = ""
    """How to read it."""
    svg: str = ""
    """A whole ``<svg>`` element with its own ``<title>`` and ``<desc>``, or
    """
    png: bytes = b""
    file: str = ""
    """Where the PNG lies, relative to the report."""


@dataclass(frozen=True)
class Pictures:
    """Small pictures of one kind, side by side where there is room."""

    pictures: Sequence[Picture]
    caption: str


Block = Text | Items | Code | Table | Picture | Pictures


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Document:
    """A whole report."""

    title: str
    lead: str
    """The report in one or two sentences."""
    sections: Sequence[Section] = field(default_factory=list)


def named(items: Sequence[str]) -> str:
    """A list in words: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 run", "2 runs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def signed(value: float, digits: int = 4) -> str:
    """A difference, with a real minus sign."""
    return f"{value:+.{digits}f}".replace("-", "−")
