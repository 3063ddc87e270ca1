"""Runs beside each other: what is known of each, a table, and a plot of their losses."""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from motifarch.errors import UserError
from motifarch.files import atomic_write
from motifarch.locks import is_locked
from motifarch.train.plots import smooth
from motifarch.train.progress import duration, means
from motifarch.train.run_folder import ENDED, LOCK, METRICS, read_metrics, read_record

_OF_THE_PLACE = ("run.output", "base")
"""Recipe fields that say where a run is, not what it is."""


@dataclass(frozen=True)
class RunSummary:
    """What a run's folder says."""

    name: str
    state: str
    """running, complete, stopped (by a signal, after saving) or failed."""
    steps: int
    total: int | None
    """Steps of the whole run."""
    parameters: int | None
    tokens: int | None
    """Targets trained on."""
    loss: float | None
    """Mean over the last steps, nats/token."""
    bits_per_byte: float | None
    """The same."""
    validation_loss: float | None
    """The last one, nats/token."""
    validation_bits_per_byte: float | None
    tokens_per_second: float | None
    """Median over the steps, all ranks together."""
    recipe: Mapping[str, Any]
    """Values by dotted name."""
    curve: Sequence[tuple[int, float, float]]
    """(tokens, seconds of training, loss) of each step."""


def find_runs(folder: Path, name: str = "") -> list[Path]:
    """The folders of runs in a folder, or the folder itself where it is a run's; errors name it by
    `name`.

    Raises:
        UserError: there is none.
    """
    found = sorted(file.parent for file in folder.rglob(METRICS)) if folder.is_dir() else []
    if not found:
        raise UserError(f"{name or folder} holds no run (a folder with {METRICS}); give a folder of runs, such as runs")
    return found


def summarise(run: Path, name: str, last: int = 0) -> RunSummary:
    """Reads a run's folder; its losses are means of so many `last` steps, by default a report's.

    Raises:
        UserError: its metrics can't be read.
    """
    record, rows = read_record(run), read_metrics(run / METRICS)
    recipe = dict(_flat(record.get("recipe", {})))
    total = recipe.get("run.steps")
    steps = rows[-1]["step"] if rows else 0
    losses = means(rows[-(last or recipe.get("log.every") or 10) :]) if rows else {}
    speeds = [row["tokens_per_second"] for row in rows if row.get("tokens_per_second")]
    validated: dict[str, Any] = next((row for row in reversed(rows) if row.get("validation_loss") is not None), {})
    return RunSummary(
        name=name,
        state=_state(run, record, steps, total),
        steps=steps,
        total=total,
        parameters=record.get("parameters"),
        tokens=rows[-1].get("targets") if rows else None,
        loss=losses.get("loss"),
        bits_per_byte=losses.get("bits_per_byte"),
        validation_loss=validated.get("validation_loss"),
        validation_bits_per_byte=validated.get("validation_bits_per_byte"),
        tokens_per_second=statistics.median(speeds) if speeds else None,
        recipe=recipe,
        curve=list(_curve(rows)),
    )


def _state(run: Path, record: Mapping[str, Any], steps: int, total: int | None) -> str:
    if is_locked(run / LOCK):
        return "running"
    if record.get(ENDED) in ("complete", "stopped"):
        return str(record[ENDED])
    return "complete" if total is not None and steps >= total else "failed"


def _curve(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float, float]]:
    seconds = 0.0
    for before, row in pairwise([{"targets": 0}, *rows]):
        new = (row.get("targets") or 0) - (before.get("targets") or 0)
        seconds += new / row["tokens_per_second"] if row.get("tokens_per_second") else 0.0
        if row.get("loss") is not None and row.get("targets") is not None:
            yield row["targets"], seconds, row["loss"]


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value); what is in a list is named by its place."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(values, dict):
        items = values.items()
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        items = enumerate(values)
    else:
        yield name, values
    for key, value in items:
        yield from _flat(value, f"{name}.{key}".removeprefix("."))


def differences(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Recipe fields that are not the same in all runs, with each run's value."""
    names = dict.fromkeys(name for run in runs for name in run.recipe if name not in _OF_THE_PLACE)
    values = {name: [run.recipe.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def table(runs: Sequence[RunSummary]) -> Table:
    """A row a run."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    made.add_column("run", overflow="fold")
    made.add_column("state")
    for name in ("steps", "tokens", "parameters", "loss", "bits/byte", "validation", "bits/byte", "tokens/s", "time"):
        made.add_column(name, justify="right")
    for run in runs:
        made.add_row(
            Text(run.name),
            run.state,
            f"{run.steps:,}" + (f"/{run.total:,}" if run.total and run.total != run.steps else ""),
            _count(run.tokens),
            _count(run.parameters),
            _number(run.loss, 4),
            _number(run.bits_per_byte, 3),
            _number(run.validation_loss, 4),
            _number(run.validation_bits_per_byte, 3),
            "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
            duration(run.curve[-1][1]) if run.curve else "–",
        )
    return made


def table_of_differences(runs: Sequence[RunSummary]) -> Table:
    """A row a recipe field that differs, a column a run."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("recipe field", *(run.name for run in runs)):
        made.add_column(Text(name), overflow="fold")
    for name, values in differences(runs).items():
        made.add_row(name, *(Text("–" if value is None else str(value)) for value in values))
    return made


def draw(runs: Sequence[RunSummary], path: Path) -> None:
    """Draws the runs' smoothed training losses by tokens and by time, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_tokens, by_time = figure.subplots(1, 2, sharey=True)
    drawn = [run for run in runs if run.curve]
    hours = max((run.curve[-1][1] for run in drawn), default=0.0) > 2 * 3600
    for run in drawn:
        losses = [loss for _, _, loss in run.curve]
        smoothed = smooth(losses, 1 - 1 / min(50, 1 + len(losses) / 25))
        by_tokens.plot([tokens for tokens, _, _ in run.curve], smoothed, linewidth=1.4, label=run.name)
        times = [seconds / (3600 if hours else 60) for _, seconds, _ in run.curve]
        by_time.plot(times, smoothed, linewidth=1.4)
    by_tokens.set_ylabel("training loss, smoothed (nats/token)")
    by_tokens.set_xlabel("tokens")
    by_time.set_xlabel(f"training time ({'hours' if hours else 'minutes'})")
    if drawn:
        legend = figure.legend(loc="outside upper center", ncols=min(4, len(drawn)), frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    for axis in (by_tokens, by_time):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")


def _count(number: int | None) -> str:
    """A large number with three figures: 4.48M."""
    if number is None:
        return "–"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
