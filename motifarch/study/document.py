"""A report before it is HTML or Markdown: sections of paragraphs, lists, tables and pictures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
    more: str = ""
    """A paragraph that belongs to it."""


def named(items: Sequence[str]) -> str:
    """A list in words: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def plural(count: int, noun: str) -> str:
    """A count with its noun: "1 run", "2 runs"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def decimals(values: Iterable[float], figures: int = 3) -> int:
    """Decimals, from none to three, that give the largest of some values so many significant
    figures.
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return min(max(figures - 1 - math.floor(math.log10(largest)), 0), 3) if largest else figures - 1


def number(value: float, digits: int) -> str:
    """A figure with a real minus sign, which one that is rounded to 0 does not have."""
    written = f"{value:,.{digits}f}"
    return written.replace("-", "−" if any(c in "123456789" for c in written) else "")


def signed(value: float, digits: int = 4) -> str:
    """A difference, with its sign."""
    written = number(value, digits)
    return f"+{written}" if value > 0 and float(f"{value:.{digits}f}") else written


def percent(share: float) -> str:
    """A relative difference."""
    return f"{signed(100 * share, 2)}%"


def sentence(text: str) -> str:
    """The text with a capital letter."""
    return text[0].upper() + text[1:]
