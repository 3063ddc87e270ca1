"""Figures out of results files: who, on what, how fast, with the middle half of the repetitions."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What tells results apart, and not what was measured.
_PROBLEM = ("function", "layout", "dtype", "precision", "batch", "length", "seq_len", "context", "rows", "columns")
_WHO = ("provider", "model")
_MEMORY = ("peak_bytes", "peak_memory_bytes")


class Figure(NamedTuple):
    """One measurement."""

    problem: tuple[tuple[str, Any], ...]
    """What was run: ("length", 2048) and the like."""
    who: str
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
        return self[:3]


class Table(NamedTuple):
    """Text in rows and columns."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """As Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"**{self.caption}**", "", *(f"| {' | '.join(line)} |" for line in lines)])


def figures(content: Mapping[str, Any]) -> list[Figure]:
    """All measurements in a benchmark's JSON; what was not the provider's best form is left out."""
    found = []
    for row in content.get("results") or ():
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
            yield from [(path, value)] if value.keys() >= {"median", "lower", "upper"} else _spreads(value, path)


def describe(problem: Sequence[tuple[str, Any]], content: Mapping[str, Any]) -> str:
    """What was run, in words."""
    parts = []
    for field, value in problem:
        if field == "layout":
            known = (content.get("layouts") or {}).get(value, value)
            parts.append(str(known.get("label", value) if isinstance(known, Mapping) else known))
        elif isinstance(value, int):
            parts.append(f"{field.replace('seq_len', 'length').replace('_', ' ')} {value:,}")
        else:
            parts.append(str(value))
    return ", ".join(parts)


def tables(content: Mapping[str, Any]) -> list[Table]:
    """The figures, a table for each measure and a column for each provider; and the aims."""
    found = figures(content)
    names = {m["name"]: m["label"] for m in content.get("models") or ()} | dict(content.get("providers") or {})
    measures = list(dict.fromkeys(f.measure for f in found))
    if any(m.endswith(" both") for m in measures):  # whole passes are enough
        measures = [m for m in measures if m.endswith(" both") or not m.startswith("seconds")]
    made = []
    for measure in measures:
        lines: dict[tuple[Any, ...], dict[str, Figure]] = {}
        for f in (f for f in found if f.measure == measure):
            lines.setdefault(f.problem, {})[f.who] = f
        who = list(dict.fromkeys(w for line in lines.values() for w in line))
        rows = [[describe(p, content), *(_written(line.get(w)) for w in who)] for p, line in lines.items()]
        made.append(Table(_caption(measure), ("At", *(names.get(w, w) for w in who)), rows))
    if judged := content.get("aims"):
        rows = []
        for aim in judged:
            ratio = aim.get("ratio", aim.get("worst"))
            measured = "–" if ratio is None else f"{ratio:.3f}"
            where = describe([(field, aim[field]) for field in _PROBLEM if field in aim], content)
            rows.append([aim["aim"], where, "met" if aim["met"] else "not met", measured])
        made.append(Table("Aims", ("Aim", "At", "Outcome", "Measured"), rows))
    return made


def _caption(measure: str) -> str:
    if measure == "peak memory":
        return "Peak memory, MiB"
    direction = measure.removeprefix("seconds").strip().replace("both", "forward and backward")
    unit = "Tokens per second" if "per_second" in measure else f"Milliseconds, {direction or 'a call'}"
    return f"{unit}, median ± half of the middle half"


def _written(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    scale = 1.0 if "per_second" in figure.measure else 1e3 if figure.repeated else 1 / (1 << 20)
    value = figure.median * scale
    text = f"{value:,.{0 if value >= 100 else 2 if value >= 1 else 4}f}"
    return f"{text} ± {50 * (figure.upper - figure.lower) / figure.median:.0f}%" if figure.repeated else text
