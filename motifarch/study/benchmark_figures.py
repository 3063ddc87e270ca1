"""Figures of the scripts in ``benchmarks/``, out of their JSON: who, at what size, how fast, with
the middle half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motifarch.study.document import Table

# What tells results apart, and not what was measured.
_PROBLEM = ("function", "layout", "dtype", "precision", "batch", "length", "seq_len", "context", "rows", "columns")
_WHO = ("contender", "model")
_LISTS = ("results", "generated")
_MEMORY = ("peak_bytes", "peak_memory_bytes")


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    problem: tuple[tuple[str, Any], ...]
    """What was run: ("length", 2048) and the like."""
    who: str
    """Whose."""
    measure: str
    """Such as "seconds forward"."""
    median: float
    lower: float
    """First quartile of the repetitions."""
    upper: float
    """Third quartile."""
    repeated: bool = True
    """Whether it was measured several times; memory is not, and so has no spread."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What a figure of the same thing has too."""
        return (self.problem, self.who, self.measure)

    @property
    def higher_is_better(self) -> bool:
        """Rates are to be high, times and bytes low."""
        return "per_second" in self.measure


def figures(content: Mapping[str, Any]) -> list[Figure]:
    """All measurements in a benchmark's JSON; what was not the contender's best form is left
    out.
    """
    found = []
    for name in _LISTS:
        for row in content.get(name) or ():
            # Counts by name instead of a list of timed rows: nothing was repeated.
            if not isinstance(row, Mapping) or row.get("best") is False:
                continue
            problem = tuple((field, row[field]) for field in _PROBLEM if field in row)
            who = next((str(row[field]) for field in _WHO if field in row), "")
            for measure, spread in _spreads(row):
                found.append(Figure(problem, who, measure, spread["median"], spread["lower"], spread["upper"]))
            if peak := next((row[field] for field in _MEMORY if row.get(field)), None):
                found.append(Figure(problem, who, "peak memory", peak, peak, peak, repeated=False))
    return found


def _spreads(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, float]]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            path = f"{prefix} {name}".strip()
            if value.keys() >= {"median", "lower", "upper"}:
                yield path, value
            else:
                yield from _spreads(value, path)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """The figures as tables, a column for each contender: whole passes, or what there is."""
    found = figures(content)
    names = _names(content)
    made = []
    measures = list(dict.fromkeys(f.measure for f in found))
    if any(m.endswith(" both") for m in measures):
        measures = [m for m in measures if m.endswith(" both") or not m.startswith("seconds")]
    for measure in measures:
        chosen = [f for f in found if f.measure == measure]
        who = list(dict.fromkeys(f.who for f in chosen))
        lines: dict[tuple[Any, ...], dict[str, Figure]] = {}
        for f in chosen:
            lines.setdefault(f.problem, {})[f.who] = f
        scale, unit = _unit(measure)
        rows = [
            (describe(problem, content), *(_written(line[w], scale) if w in line else "–" for w in who))
            for problem, line in lines.items()
        ]
        made.append(Table(unit, ("At", *(names.get(w, w) for w in who)), rows))
    return made


def _names(content: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {m["name"]: m["label"] for m in content.get("models") or () if "label" in m}
    return names | dict(content.get("contenders") or {})


def describe(problem: Sequence[tuple[str, Any]], content: Mapping[str, Any]) -> str:
    """What was run, in words."""
    layouts = content.get("layouts") or {}
    parts = []
    for field, value in problem:
        if field == "layout":
            known = layouts.get(value, value)
            parts.append(str(known.get("label", value)) if isinstance(known, Mapping) else str(known))
        elif isinstance(value, int):
            parts.append(f"{field.replace('seq_len', 'length').replace('_', ' ')} {value:,}")
        else:
            parts.append(str(value))
    return ", ".join(parts)


def _unit(measure: str) -> tuple[float, str]:
    """What to multiply by, and how that is called."""
    spread = "median ± half of the middle half"
    if "per_second" in measure:
        return 1.0, f"Tokens per second, {spread}"
    if measure == "peak memory":
        return 1 / (1 << 20), "Peak memory, MiB"
    direction = measure.removeprefix("seconds").strip()
    names = {"both": "forward and backward together", "": "a call"}
    return 1e3, f"Milliseconds, {names.get(direction, direction)}, {spread}"


def _written(figure: Figure, scale: float) -> str:
    value = figure.median * scale
    digits = 0 if value >= 100 else 2 if value >= 1 else 4
    if not figure.repeated:
        return f"{value:,.{digits}f}"
    half = 50 * (figure.upper - figure.lower) / figure.median if figure.median else 0.0
    return f"{value:,.{digits}f} ± {half:.0f}%"


def aims(content: Mapping[str, Any]) -> Table | None:
    """What the benchmark was to reach and did or did not; None where it judged nothing."""
    judged = content.get("aims") or ()
    if not judged:
        return None
    rows = []
    for aim in judged:
        problem = describe([(f, aim[f]) for f in _PROBLEM if f in aim], content)
        ratio = aim.get("ratio", aim.get("worst"))
        rows.append(
            (aim["aim"], problem, "met" if aim["met"] else "not met", f"{ratio:.3f}" if ratio is not None else "–")
        )
    return Table("Aims", ("Aim", "At", "Outcome", "Measured"), rows, 3)
