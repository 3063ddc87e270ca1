"""The charts of a report: lines with their names at their ends, loss by head ratio, intervals, heat
maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from motifarch.study.statistics import Estimate
from motifarch.study.svg import (
    MARKERS,
    Scale,
    bounds,
    drawing,
    element,
    grid,
    marker,
    round_labels,
    spread_out,
    text,
)

WIDTH = 640
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 150, 44, 58
# Of a letter of a bold label, at the size that phones need.
_LETTER = 9.9
# Room for "worse" to the right of the line of no difference.
_WORSE = 84


@dataclass(frozen=True)
class Series:
    """A named line."""

    label: str
    kind: int
    """Which colour and marker; see :data:`motifarch.study.svg.MARKERS`."""
    points: Sequence[tuple[float, float]]
    hollow: bool = False


def lines(
    title: str,
    description: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    height: int = 380,
    top: float | None = None,
    zero: bool = False,
    whole: bool = False,
) -> str:
    """Lines over a common axis, each with a marker and its name at its end.

    Args:
        title: of the drawing, not shown in it.
        description: what it shows, for who cannot see it.
        series: the lines; those without points are left out.
        x_label: below.
        y_label: above the side.
        height: in the units of the drawing, which is 640 wide.
        top: values above this one are cut off.
        zero: whether the line at 0 is stressed and always in view.
        whole: whether x is a count, and every point has a marker.
    """
    shown = [s for s in series if s.points]
    xs = [x for s in shown for x, _ in s.points]
    ys = [y for s in shown for _, y in s.points if top is None or y <= top]
    low, high = bounds([*ys, *([0.0] if zero else [])])
    right = max(_RIGHT, 26 + _LETTER * max((len(s.label) for s in shown), default=0))
    x = Scale(min(xs, default=0), max(xs, default=1), _LEFT, WIDTH - right)
    y = Scale(low, high, height - _BOTTOM, _TOP if y_label else 12)
    x_ticks = [(v, f"{v:g}") for v in _whole(xs)] if whole else None
    parts = [grid(x, y, x_label, y_label, x_ticks=x_ticks, zero=zero)]
    ends = [max(min(y(s.points[-1][1]), y.start), y.end) for s in shown]
    places = spread_out(ends, 21, y.end, y.start)
    for s, end, place in zip(shown, ends, places, strict=True):
        visible = [(a, b) for a, b in s.points if math.isfinite(b) and (top is None or b <= top)]
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in visible)
        look = f"s{s.kind % len(MARKERS)} line"
        parts.append(element("polyline", points=path, class_=f"{look} dashed" if s.hollow else look))
        for a, b in visible if whole else visible[-1:]:
            parts.append(marker(s.kind, x(a), y(b), 4 if whole else 4.5, hollow=s.hollow))
        parts.append(_leader(x(s.points[-1][0]), end, x.end + 18, place))
        parts.append(text(x.end + 22, place + 5, s.label, class_=f"label t{s.kind % len(MARKERS)}"))
    return drawing(title, description, WIDTH, height, parts)


def _leader(x: float, y: float, to_x: float, to_y: float) -> str:
    """From a line's end to its name."""
    d = f"M{x + 7:.1f} {y:.1f}L{to_x:.1f} {to_y:.1f}"
    return element("path", d=d, class_="leader")


def _whole(values: Sequence[float]) -> list[float]:
    every = sorted(set(values))
    return every[:: max(1, math.ceil(len(every) / 8))]


@dataclass(frozen=True)
class Dot:
    """A mean over seeds and the seeds themselves, at a head ratio (or beside the axis: None)."""

    label: str
    kind: int
    estimate: Estimate
    values: Sequence[tuple[int, float]]
    """(seed, value)."""
    hollow: bool = False


def by_ratio(
    title: str, description: str, columns: Sequence[tuple[str, Sequence[Dot]]], y_label: str, *, joined: Sequence[str]
) -> str:
    """Means with intervals and single seeds, a column for each attention.

    Args:
        title: of the drawing.
        description: what it shows.
        columns: (name, dots side by side).
        y_label: above the side.
        joined: columns whose means a line connects: those of one family.
    """
    height = 420
    dots = [dot for _, column in columns for dot in column]
    values = [v for dot in dots for _, v in dot.values]
    # Two seeds have an interval twelve times as wide as their distance: it may leave the chart.
    sure = [dot.estimate for dot in dots if dot.estimate.n > 2]
    values += [v for e in sure for v in (e.lower, e.upper) if v is not None]
    x = Scale(-0.5, len(columns) - 0.5, _LEFT, WIDTH - 8)
    y = Scale(*bounds(values), height - 76, _TOP)
    parts = [grid(x, y, "", y_label, x_ticks=[])]
    trails: dict[bool, list[str]] = {}
    for at, (name, column) in enumerate(columns):
        head, _, tail = name.rpartition(" ")
        for row, word in enumerate(filter(None, (head, tail))):
            parts.append(text(x(at), y.start + 24 + 20 * row, word, class_="tick", text_anchor="middle"))
        for i, dot in enumerate(column):
            place = x(at + (i - (len(column) - 1) / 2) * 0.34)
            if name in joined:
                trails.setdefault(dot.hollow, []).append(f"{place:.1f},{y(dot.estimate.mean):.1f}")
            parts += _whisker(dot, place, y)
    under = [
        element("polyline", points=" ".join(t), class_="trail dashed" if h else "trail") for h, t in trails.items()
    ]
    return drawing(title, description, WIDTH, height, [parts[0], *under, *parts[1:]])


def _whisker(dot: Dot, place: float, y: Scale) -> list[str]:
    parts = []
    if dot.estimate.lower is not None and dot.estimate.upper is not None:
        low, high = (min(max(y(end), y.end), y.start) for end in (dot.estimate.lower, dot.estimate.upper))
        caps = [end for end in (low, high) if y.end < end < y.start]
        d = f"M{place:.1f} {low:.1f}V{high:.1f}" + "".join(f"M{place - 6:.1f} {cap:.1f}h12" for cap in caps)
        parts.append(element("path", d=d, class_=f"s{dot.kind % len(MARKERS)} line"))
    for seed, value in dot.values:
        note = element("title", escape(f"{dot.label}, seed {seed}: {value:.4f}"))
        parts.append(element("circle", note, cx=place + 11, cy=y(value), r=2.2, class_="seed"))
    parts.append(marker(dot.kind, place, y(dot.estimate.mean), 6, hollow=dot.hollow, note=dot.label))
    return parts


@dataclass(frozen=True)
class Interval:
    """A row of a chart of differences."""

    label: str
    kind: int
    wide: Estimate
    """Drawn thin: with its own noise."""
    narrow: Estimate | None
    """Drawn thick: with the noise of all."""
    hollow: bool = False


def intervals(title: str, description: str, rows: Sequence[Interval], x_label: str) -> str:
    """Differences with their intervals around the line of no difference, a row each."""
    height = 62 + 36 * len(rows) + 50
    ends = [v for row in rows for e in (row.wide, row.narrow) if e for v in (e.lower, e.upper, e.mean) if v is not None]
    left = 16 + _LETTER * max((len(row.label) for row in rows), default=0)
    x = Scale(*bounds([*ends, 0.0]), left, WIDTH - 12)
    if x(0.0) > WIDTH - _WORSE:
        x = Scale(x.low, x.high, left, WIDTH - _WORSE)
    bottom = height - 50
    parts = []
    ticks = x.ticks(5)
    for value, label in zip(ticks, round_labels(ticks), strict=True):
        look = "rule zero" if abs(value) < 1e-12 else "rule"
        parts.append(element("line", x1=x(value), x2=x(value), y1=38, y2=bottom, class_=look))
        parts.append(text(x(value), bottom + 22, label, class_="tick", text_anchor="middle"))
    parts.append(text((x.start + x.end) / 2, bottom + 46, x_label, class_="axis", text_anchor="middle"))
    parts.append(text(x(0.0) - 8, 26, "← better", class_="axis", text_anchor="end"))
    parts.append(text(x(0.0) + 8, 26, "worse →", class_="axis"))
    for i, row in enumerate(rows):
        at = 62 + 36 * i
        parts.append(text(0, at + 5, row.label, class_=f"label t{row.kind % len(MARKERS)}"))
        for found, look in ((row.wide, "line"), (row.narrow, "line thick")):
            if found and found.lower is not None and found.upper is not None:
                d = f"M{x(found.lower):.1f} {at}H{x(found.upper):.1f}"
                parts.append(element("path", d=d, class_=f"s{row.kind % len(MARKERS)} {look}"))
        note = f"{row.label}: {row.wide.mean:+.4f}"
        parts.append(marker(row.kind, x(row.wide.mean), float(at), 6, hollow=row.hollow, note=note))
    return drawing(title, description, WIDTH, height, parts)


def heat_map(
    title: str,
    description: str,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    middle: float = 0.0,
    reach: float,
    write: Callable[[float], str],
    letters: int = 0,
) -> str:
    """A table in colour, blue above a middle and orange below it, with the figures written into it.

    Args:
        title: of the drawing.
        description: what it shows.
        values: by row and column; what is not finite stays blank.
        rows: names down the side.
        columns: names along the bottom.
        middle: what has the palest colour: the value that means nothing was found.
        reach: how far from it the deepest colours are.
        write: a value as it is written into its cell.
        letters: of the longest figure in maps that are to have cells of one size.
    """
    longest = max([letters, *(len(write(v)) for line in values for v in line if math.isfinite(v))])
    left = 12 + _LETTER * max(map(len, rows), default=0)
    cell_h, cell_w = 40, max(266 / max(1, len(columns)), 4 + _LETTER * longest)
    width, height = math.ceil(left + cell_w * len(columns)), 30 + cell_h * len(rows) + 54
    parts = [text(0, 16, "length", class_="axis")]
    for r, (name, line) in enumerate(zip(rows, values, strict=True)):
        at = 26 + cell_h * r
        parts.append(text(left - 8, at + cell_h / 2 + 5, name, class_="tick", text_anchor="end"))
        for c, value in enumerate(line):
            if not math.isfinite(value):
                continue
            fill = shade((value - middle) / reach if reach else 0.0)
            size = {"width": cell_w - 2, "height": cell_h - 2, "rx": 2}
            parts.append(element("rect", "", x=left + c * cell_w, y=at, fill=fill, **size))
            look = "cell on-dark" if luminance(fill) < _DARK else "cell on-light"
            place = left + (c + 0.5) * cell_w - 1
            parts.append(text(place, at + cell_h / 2 + 4, write(value), class_=look, text_anchor="middle"))
    for c, name in enumerate(columns):
        place = left + (c + 0.5) * cell_w
        parts.append(text(place, height - 34, name, class_="tick", text_anchor="middle"))
    parts.append(text((left + width) / 2, height - 10, "depth", class_="axis", text_anchor="middle"))
    return drawing(title, description, width, height, parts)


# Below this luminance white is the clearer text, above it black (WCAG 2: each has 4.5:1 or more on
# its side).
_DARK = 0.179
_PALE = (243, 243, 241)
_BLUES, _ORANGES = ((112, 171, 219), (8, 62, 108)), ((235, 160, 92), (132, 50, 0))


def shade(share: float) -> str:
    """From deep orange (-1) over near white (0) to deep blue (1).

    Lightness falls steadily to both sides, so that the size of a value reads in grey too; its sign
    is in its figure.
    """
    middle, deep = _BLUES if share > 0 else _ORANGES
    place = 2 * min(abs(share), 1.0)
    start, end, way = (_PALE, middle, place) if place <= 1 else (middle, deep, place - 1)
    return "#" + "".join(f"{round(a + (b - a) * way):02x}" for a, b in zip(start, end, strict=True))


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb``, from 0 to 1, after WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
