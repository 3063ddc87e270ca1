"""Aims, tables and plots of models' figures: speed and memory beside Llama and DiffLlama.

Results are rows as JSON has them: what was run ("precision", and "seq_len" or "batch" and
"context"), "model", "tokens_per_second" (a spread), and perhaps "peak_memory_bytes" and others.
"""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks.lib import report
from benchmarks.models.providers import DIFFLLAMAS, LLAMAS, PROVIDERS

Result = Mapping[str, Any]
Cell = tuple[tuple[str, Any], ...]
"""What was run: ("precision", "bf16"), ("seq_len", 512)."""

# A rival is a model with any of its attentions: the fastest of those measured stands for it, in
# memory too.
RIVALS = {"Llama": LLAMAS, "DiffLlama": DIFFLLAMAS}
SPEED, MEMORY = "tokens_per_second", "peak_memory_bytes"


class Aim(NamedTuple):
    """What our models are meant to reach: a ratio to a rival's figure."""

    rival: str
    """In :data:`RIVALS`."""
    measure: str
    """:data:`SPEED` (at least the bound) or :data:`MEMORY` (below it)."""
    bound: float
    seq_len: int | None = None
    """Where; None for everywhere."""

    def describe(self, model: str) -> str:
        """In words."""
        where = "" if self.seq_len is None else f" at {self.seq_len} tokens"
        if self.measure == SPEED:
            return f"{PROVIDERS[model].label}: speed{where} is at least {self.bound:g} of {self.rival}'s"
        return f"{PROVIDERS[model].label}: peak memory{where} is below {self.rival}'s"


def figure_of(result: Result, measure: str) -> float:
    """A result's speed (the median) or memory."""
    value = result[measure]
    return float(value["median"] if isinstance(value, Mapping) else value)


def fastest(results: Iterable[Result], names: Sequence[str]) -> Result | None:
    """The fastest of some models in one cell's results; None where none was measured."""
    found = [r for r in results if r["model"] in names]
    return max(found, key=lambda r: figure_of(r, SPEED), default=None)


def cells(results: Iterable[Result]) -> dict[Cell, list[Result]]:
    """The results by what was run, in the order measured."""
    grouped: dict[Cell, list[Result]] = {}
    for r in results:
        cell = tuple((field, r[field]) for field in ("precision", "seq_len", "batch", "context") if field in r)
        grouped.setdefault(cell, []).append(r)
    return grouped


def describe(cell: Mapping[str, Any]) -> str:
    """A cell, or a row that has its fields, in words."""
    if "seq_len" in cell:
        return f"{cell['precision']}, {cell['seq_len']} tokens"
    return f"{cell['precision']}, {cell['batch']} x {cell['context']:,}"


def judge(results: Iterable[Result], models: Sequence[str], aims: Sequence[Aim]) -> list[dict[str, Any]]:
    """Hold measured results to aims: an entry for each cell, model and aim that was measured."""
    judged = []
    for (cell, rows), model, aim in itertools.product(cells(results).items(), models, aims):
        ours, rival = fastest(rows, [model]), fastest(rows, RIVALS[aim.rival])
        if ours is None or rival is None or aim.seq_len not in (None, dict(cell).get("seq_len")):
            continue
        ratio = figure_of(ours, aim.measure) / figure_of(rival, aim.measure)
        met = ratio >= aim.bound if aim.measure == SPEED else ratio < aim.bound
        verdict = {"measure": aim.measure, "bound": aim.bound, "ratio": ratio, "met": met}
        judged.append({"aim": aim.describe(model), **dict(cell), "model": model, "rival": rival["model"], **verdict})
    return judged


def print_aims(console: Console, aims: Sequence[Result]) -> None:
    """Which were met."""
    for aim in aims:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        rest = f"{aim['aim']}: [bold]{aim['ratio']:.3f}[/bold], against {PROVIDERS[aim['rival']].label}"
        console.print(f"{verdict}  {describe(aim)}: {rest}", soft_wrap=True)
    if not aims:
        console.print("No aim was judged: that takes a full run with one of ours and its rivals.")


def print_models(console: Console, models: Sequence[Result]) -> None:
    """The table of what was compared."""
    headings = ("model", "library", "attention", "MLP", "MLP\nsize", "parameters", "of\nLlama")
    rows = [
        (
            *(m["label"], m["library"], m["attention"], m["feed_forward"]),
            *(f"{m['intermediate_size']:,}", f"{m['parameters']:,}", f"{m['relative_parameters']:.3f}"),
        )
        for m in models
    ]
    console.print(report.table("Models", headings, rows, text_columns=4))


def print_cells(console: Console, results: Iterable[Result], more: Mapping[str, Callable[[Result], str]]) -> None:
    """A table for each cell: speed, beside the rivals', and more columns by their headings."""
    for cell, rows in cells(results).items():
        best = {f"of\n{rival}": fastest(rows, names) for rival, names in RIVALS.items()}
        rivals = {heading: figure_of(r, SPEED) for heading, r in best.items() if r is not None}
        lines = [
            [
                PROVIDERS[r["model"]].label,
                f"{figure_of(r, SPEED):,.4g}",
                f"±{report.half_spread(r[SPEED]):.1f}%",
                *(f"{figure_of(r, SPEED) / of:.2f}" for of in rivals.values()),
                *(column(r) for column in more.values()),
            ]
            for r in rows
        ]
        console.print(
            report.table(describe(dict(cell)), ["model", "tokens\nper s", "middle\nhalf", *rivals, *more], lines)
        )


def draw(path: Path, content: Mapping[str, Any], title: str) -> None:
    """Plot speed and, where it was measured, memory; a row for each precision.

    Speed is relative to the fastest Llama's, without one to the first model's.
    """
    results = content["results"]
    measured = [m["name"] for m in content["models"] if any(r["model"] == m["name"] for r in results)]
    palette = itertools.cycle(report.COLOURS)
    colours = {PROVIDERS[name].label: report.GREY if name == "llama" else next(palette) for name in measured}
    precisions = list(dict.fromkeys(r["precision"] for r in results))
    panels = [SPEED, *([MEMORY] if MEMORY in results[0] else [])]
    figure, axes = report.figure(len(precisions), len(panels), size=(13, 1.6 + 3.2 * len(precisions)))
    for (i, precision), (j, measure) in itertools.product(enumerate(precisions), enumerate(panels)):
        found = {cell: rows for cell, rows in cells(results).items() if dict(cell)["precision"] == precision}
        series: dict[str, list[float]] = {label: [] for label in colours}
        ends: dict[str, list[tuple[float, float]]] = {label: [] for label in colours}
        for rows, name in itertools.product(found.values(), measured):
            # A model that has no figure here has no bar.
            r = fastest(rows, [name])
            unit = figure_of(fastest(rows, LLAMAS) or rows[0], SPEED) if measure == SPEED else 1 << 30
            spread = r[SPEED] if r and measure == SPEED else dict.fromkeys(("lower", "upper"), r[MEMORY] if r else 0.0)
            series[PROVIDERS[name].label].append(figure_of(r, measure) / unit if r else 0.0)
            ends[PROVIDERS[name].label].append((spread["lower"] / unit, spread["upper"] / unit))
        groups = [describe(dict(cell)).partition(", ")[2] for cell in found]
        report.grouped_bars(axes[i][j], groups, series, colours=colours, errors=ends)
        axes[i][j].set_title(f"{precision}: " + ("speed, of Llama's" if measure == SPEED else "peak memory, GiB"))
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=min(6, len(texts)), frameon=False)
    machine = textwrap.fill(report.describe(content["environment"]), 90)
    figure.suptitle(f"{title}\n{machine}", fontsize=11)
    report.write_plot(path, figure)
