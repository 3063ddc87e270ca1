"""The parts of small charts: SVG elements, scales, axes, markers, labels that keep clear of each
other.

Colours are CSS variables of the page, so that one drawing serves light, dark and print. Nothing is
told by colour alone: every series has a marker of its own and a label at its end.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from scipy import optimize

MARKERS = ("circle", "square", "up", "diamond", "down", "star", "plus", "cross")


def element(name: str, content: str = "", **attributes: object) -> str:
    """An SVG element; ``_`` in attribute names stands for ``-``, and numbers are rounded."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def text(x: float, y: float, content: str, **attributes: object) -> str:
    """A piece of text."""
    return element("text", escape(content), x=x, y=y, **attributes)


def drawing(title: str, description: str, width: int, height: int, parts: Sequence[str]) -> str:
    """A whole picture, with words for who cannot see it."""
    # Of its content: the same results make the same page.
    key = "c" + hashlib.sha256("".join([title, description, *parts]).encode()).hexdigest()[:10]
    head = element("title", escape(title), id=f"{key}t") + element("desc", escape(description), id=f"{key}d")
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{key}t {key}d" '
        f'xmlns="http://www.w3.org/2000/svg">{head}{"".join(parts)}</svg>'
    )


def marker(kind: int, x: float, y: float, size: float = 4.5, *, hollow: bool = False, note: str = "") -> str:
    """The mark of series number ``kind``: a shape in its colour.

    Args:
        kind: counts from 0; shapes and colours repeat after eight.
        x: where.
        y: where.
        size: half of its width.
        hollow: only its outline.
        note: shown by browsers that are pointed at it.
    """
    shape = MARKERS[kind % len(MARKERS)]
    title = element("title", escape(note)) if note else ""
    look = f"s{kind % len(MARKERS)} {'hollow' if hollow else 'solid'}"
    if shape == "circle":
        return element("circle", title, cx=x, cy=y, r=size, class_=look)
    if shape in ("cross", "plus"):
        a, b = (size, size) if shape == "cross" else (1.3 * size, 0.0)
        path = f"M{x - a:.1f} {y - b:.1f}L{x + a:.1f} {y + b:.1f}M{x - b:.1f} {y + a:.1f}L{x + b:.1f} {y - a:.1f}"
        return element("path", title, d=path, class_=f"s{kind % len(MARKERS)} line{' bold' if not hollow else ''}")
    corners = {"square": (4, 45, 1.25), "diamond": (4, 0, 1.3), "up": (3, -90, 1.35), "down": (3, 90, 1.35)}
    n, turn, scale = corners.get(shape, (10, -90, 1.5))
    angles = [math.radians(turn + 360 / n * i) for i in range(n)]
    # Every second corner of a star lies further in.
    radii = [scale * size * (0.48 if shape == "star" and i % 2 else 1) for i in range(n)]
    points = " ".join(
        f"{x + r * math.cos(a):.1f},{y + r * math.sin(a):.1f}" for r, a in zip(radii, angles, strict=True)
    )
    return element("polygon", title, points=points, class_=look)


@dataclass(frozen=True)
class Scale:
    """From values to places on the page."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The place of a value."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the scale."""
        from matplotlib.ticker import MaxNLocator

        found = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(t) for t in found if self.low - slack <= t <= self.high + slack]


# Unit, its letter, and the largest tick from which it is used.
_UNITS = ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 2e3))


def round_labels(ticks: Sequence[float]) -> list[str]:
    """Ticks in as few digits as tell them apart; large numbers with k, M or G."""
    if not ticks:
        return []
    largest = max(abs(t) for t in ticks)
    unit, suffix = next(((u, s) for u, s, least in _UNITS if largest >= least), (1.0, ""))
    step = (ticks[1] - ticks[0]) / unit if len(ticks) > 1 else largest / unit or 1.0
    digits = max(0, -math.floor(math.log10(abs(step)) + 1e-9)) if step else 0
    if abs(step) * 10**digits % 1 > 1e-6:  # a step of 2.5
        digits += 1
    return [f"{t / unit:.{digits}f}{suffix if t else ''}".replace("-", "−") for t in ticks]


def grid(
    x: Scale,
    y: Scale,
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    zero: bool = False,
    count: int = 5,
) -> str:
    """Horizontal lines with their values, values along the bottom, and what they are.

    Args:
        x: of the bottom.
        y: of the side.
        x_label: below.
        y_label: above the side, where it needs no turning of heads.
        x_ticks: values and labels, where round numbers will not do.
        zero: whether the line at 0 is stressed.
        count: ticks at most, on each side.
    """
    parts = [text(0, y.end - 14, y_label, class_="axis")]
    ticks = y.ticks(count)
    for value, label in zip(ticks, round_labels(ticks), strict=True):
        look = "rule zero" if zero and abs(value) < 1e-12 else "rule"
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_=look))
        parts.append(text(x.start - 8, y(value) + 5, label, class_="tick", text_anchor="end"))
    if x_ticks is None:
        values = x.ticks(count)
        x_ticks = list(zip(values, round_labels(values), strict=True))
    for value, label in x_ticks:
        parts.append(text(x(value), y.start + 22, label, class_="tick", text_anchor="middle"))
    parts.append(text((x.start + x.end) / 2, y.start + 46, x_label, class_="axis", text_anchor="middle"))
    return "".join(parts)


def spread_out(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves labels as little as needed so that neighbours are ``gap`` apart, within bounds as far
    as there is room.
    """
    if not places:
        return []
    order = np.argsort(places, kind="stable")
    steps = gap * np.arange(len(places))
    # Less their steps, places that are far enough apart are those that never fall: isotonic
    # regression.
    level = optimize.isotonic_regression(np.asarray(places, dtype=float)[order] - steps).x
    level = np.clip(level, low, max(low, high - steps[-1]))
    moved = np.empty(len(places))
    moved[order] = level + steps
    return [float(place) for place in moved]


def bounds(values: Sequence[float], margin: float = 0.06) -> tuple[float, float]:
    """The range of values with some air; any range where there are none."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    air = margin * (high - low) or 0.05 * abs(high) or 1.0
    return low - air, high + air
