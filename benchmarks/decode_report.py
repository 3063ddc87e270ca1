"""The tables, the aims and the pictures of the decoding benchmark, from the figures in its JSON
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.attention_problems import LAYOUTS, describe
from benchmarks.attention_report import label
from benchmarks.contenders import CONTENDERS as MODELS
from benchmarks.decode_contenders import CONTENDERS, OURS
from benchmarks.decode_generate import DIFFLLAMA
from benchmarks.kernel_report import print_limits
from benchmarks.lib import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

LONG = 32768
_COLOURS = {
    "triton": report.COLOURS[0],
    "sdpa": report.COLOURS[5],
    "four": report.COLOURS[4],
    "two": report.COLOURS[3],
    "one": report.COLOURS[1],
    "flex": report.COLOURS[2],
}


@dataclass(frozen=True)
class Aim:
    """What the decoding kernel is meant to reach on a GPU, in bf16, at every batch with at least
    32K tokens a row.
    """

    text: str
    bound: float
    rival: str | None = None
    """How many times faster than this contender's best; without one, the share of the copy
    bandwidth.
    """

    def ratio(self, ours: Result, cell: Mapping[str, Result]) -> float | None:
        """The measured figure, or None where the rival was not measured."""
        if self.rival is None:
            return float(ours["copy_share"])
        rival = cell.get(self.rival)
        return None if rival is None else rival["seconds"]["median"] / ours["seconds"]["median"]


GPU_AIMS = (
    Aim("at least 85% of copy bandwidth from 32K tokens", 0.85),
    Aim("at least 1.8 times the best four calls from 32K tokens", 1.8, "four"),
    Aim("at least 1.35 times the best two calls from 32K tokens", 1.35, "two"),
)


def judge_kernels(results: Sequence[Result], device: torch.device) -> list[dict[str, Any]]:
    """Hold the kernel to the aims: for each layout the worst of its sizes.

    What was not measured is not judged, and nothing is on a CPU, where the kernel does not run.
    """
    judged: list[dict[str, Any]] = []
    if device.type != "cuda":
        return judged
    groups = _groups([r for r in results if r["dtype"] == "bf16" and r["context"] >= LONG])
    for (layout, _), cells in groups.items():
        for aim in GPU_AIMS:
            ratios = []
            for (batch, context), cell in cells.items():
                ratio = aim.ratio(cell["triton"], cell) if "triton" in cell else None
                if ratio is not None:
                    ratios.append((ratio, batch, context))
            if ratios:
                worst, batch, context = min(ratios)
                judged.append(
                    {
                        "part": "kernel",
                        "aim": aim.text,
                        "layout": layout,
                        "rival": aim.rival,
                        "bound": aim.bound,
                        "sizes": len(ratios),
                        "ratio": worst,
                        "batch": batch,
                        "context": context,
                        "met": worst >= aim.bound,
                    }
                )
    return judged


Cells = dict[tuple[int, int], dict[str, Result]]


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], Cells]:
    """The best results: (layout, dtype) -> (batch, context), in order -> contender."""
    groups: dict[tuple[str, str], Cells] = {}
    for r in sorted(results, key=lambda r: (r["batch"], r["context"])):
        if r["best"]:
            cells = groups.setdefault((r["layout"], r["dtype"]), {})
            cells.setdefault((r["batch"], r["context"]), {})[r["contender"]] = r
    return groups


def print_kernels(console: Console, content: Mapping[str, Any]) -> None:
    """The tables of each contender's best kernel, who was refused, and the sizes that were
    skipped.
    """
    print_limits(console, content)
    for (name, dtype), cells in _groups(content["results"]).items():
        rows = []
        for (batch, context), cell in cells.items():
            ours = next((cell[who] for who in OURS if who in cell), None)
            for i, r in enumerate(cell.values()):
                seconds = r["seconds"]
                rows.append(
                    (
                        f"{batch:,} x {context:,}" if i == 0 else "",
                        label(r, CONTENDERS),
                        *(f"{1e6 * seconds['median']:,.1f}", f"{report.half_spread(seconds):.0f}%"),
                        *(f"{r['gb_per_second']:,.1f}", f"{100 * r['copy_share']:.0f}%"),
                        f"{100 * r['share_of_floor']:.0f}%",
                        f"{seconds['median'] / ours['seconds']['median']:.2f}" if ours else "-",
                    )
                )
            floor = next(iter(cell.values()))["floor_seconds"]
            limiting = "bytes" if floor["floor"] == floor["bytes"] else "operations"
            rows.append(("", f"floor, by {limiting}", f"{1e6 * floor['floor']:,.1f}", "", "", "", "", ""))
        title = f"{describe(LAYOUTS[name])}, {dtype}: one new token a row"
        headings = ["rows x\ncontext", "", "µs", "±", "GB/s", "of\ncopy", "of\nfloor", "of ours'\ntime"]
        console.print(report.table(title, headings, rows, text_columns=2))
    for r in content["refused"]:
        console.print(f"[red]refused[/red] {label(r, CONTENDERS)} at {_size(r)}: {r['reason']}", soft_wrap=True)
    for r in content["skipped"]:
        console.print(f"[yellow]skipped[/yellow] {_size(r)}: {r['reason']}", soft_wrap=True)
    if content["not_begun"]:
        names = "; ".join(map(_size, content["not_begun"]))
        console.print(f"[yellow]not begun, for the time was over[/yellow]: {names}", soft_wrap=True)


def _size(r: Result) -> str:
    return f"{describe(LAYOUTS[r['layout']])}, {r['dtype']}, {r['batch']:,} x {r['context']:,}"


def print_generate(console: Console, content: Mapping[str, Any]) -> None:
    """The tables of the models and, for each precision, of their speed at each size."""
    models = {m["name"]: m for m in content["models"]}
    precisions = dict.fromkeys(r["precision"] for r in content["generated"])
    console.print(
        report.table(
            f"Models, {content['settings']['cache']} cache",
            ("model", "library", "attention", "parameters", "of\nLlama", f"KiB a token\n{', '.join(precisions)}"),
            [
                (
                    *(m["label"], m["library"], m["attention"], f"{m['parameters']:,}"),
                    f"{m['relative_parameters']:.3f}",
                    ", ".join(f"{size / 1024:,.2f}" for size in _cache_sizes(content["generated"], name)),
                )
                for name, m in models.items()
            ],
            text_columns=3,
        )
    )
    for (precision, batch, context), cell in _by_size(content["generated"]).items():
        speed = {name: r["tokens_per_second"]["median"] for name, r in cell.items()}
        fastest = max((speed[name] for name in DIFFLLAMA if name in speed), default=None)
        rows = [
            (
                models[name]["label"],
                f"{speed[name]:,.1f}",
                f"{report.half_spread(r['tokens_per_second']):.1f}%",
                f"{speed[name] / fastest:.2f}" if fastest else "-",
                f"{speed[name] / speed['llama']:.2f}" if "llama" in speed else "-",
            )
            for name, r in cell.items()
        ]
        title = f"{precision}, {batch:,} x {context:,}: generate after the prompt"
        console.print(report.table(title, ("model", "tokens\nper s", "±", "of Diff-\nLlama", "of\nLlama"), rows))


def _cache_sizes(results: Sequence[Result], name: str) -> list[int]:
    """A model's bytes of cache for a token of a row, in each precision."""
    return list({r["precision"]: r["cache_bytes_per_token"] for r in results if r["model"] == name}.values())


def _by_size(results: Sequence[Result]) -> dict[tuple[str, int, int], dict[str, Result]]:
    """(precision, batch, context), in the order measured -> model -> result."""
    cells: dict[tuple[str, int, int], dict[str, Result]] = {}
    for r in results:
        cells.setdefault((r["precision"], r["batch"], r["context"]), {})[r["model"]] = r
    return cells


def print_aims(console: Console, aims: Sequence[Result]) -> None:
    """Which were met."""
    for aim in aims:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        if aim["part"] == "kernel":
            where, worst = describe(LAYOUTS[aim["layout"]]), f" at worst ({aim['batch']:,} x {aim['context']:,})"
        else:
            where, worst = f"{aim['precision']}, {aim['batch']:,} x {aim['context']:,}", ""
        console.print(f"{verdict}  {where}: {aim['aim']}: [bold]{aim['ratio']:.2f}[/bold]{worst}", soft_wrap=True)
    if not aims:
        console.print("No aim was judged: that takes a full run, for the kernels' on a GPU and at 32K tokens.")


def draw_kernels(path: Path, content: Mapping[str, Any]) -> None:
    """The picture: the share of the copy bandwidth by context, a row a layout and a panel a
    batch.
    """
    groups = _groups(content["results"])
    batches = sorted({batch for cells in groups.values() for batch, _ in cells})
    found = {who for cells in groups.values() for cell in cells.values() for who in cell}
    names = [who for who in CONTENDERS if who in found]
    figure, axes = report.figure(len(groups), len(batches), size=(max(13, 5 * len(batches)), 1.4 + 3 * len(groups)))
    for ((name, dtype), cells), line in zip(groups.items(), axes, strict=True):
        for batch, axis in zip(batches, line, strict=True):
            _panel(axis, {context: cell for (b, context), cell in cells.items() if b == batch}, names)
            axis.set_title(f"{describe(LAYOUTS[name])}, {dtype}, batch {batch}", fontsize=9)
        line[0].set_ylabel("% of copy bandwidth")
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[who], label=CONTENDERS[who]) for who in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    heading = "decoding one token a row, each cached key and value counted once, by tokens in the cache"
    figure.suptitle(f"{heading}\n{report.describe(content['environment'])}", fontsize=11)
    report.write_plot(path, figure)


def _panel(axis: Axes, cells: Mapping[int, Mapping[str, Result]], names: Sequence[str]) -> None:
    """Lines over the contexts."""
    for who in names:
        points = [(context, 100 * cell[who]["copy_share"]) for context, cell in cells.items() if who in cell]
        if points:
            axis.plot(*zip(*points, strict=True), color=_COLOURS[who], marker="o", markersize=4, linewidth=1.4)
    if cells:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(cells), [f"{n:,}" for n in cells])
        axis.minorticks_off()
    axis.axhline(100, color="#555555", linewidth=0.8, linestyle="--", zorder=0)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def draw_generate(path: Path, content: Mapping[str, Any]) -> None:
    """The picture: tokens per second relative to Llama's (without it, to the first model's), a
    panel a precision.
    """
    sizes = _by_size(content["generated"])
    names = [m["name"] for m in content["models"]]
    base = "llama" if "llama" in names else names[0]
    palette = iter(report.COLOURS)
    colours = {MODELS[name].label: report.GREY if name == base else next(palette) for name in names}
    precisions = list(dict.fromkeys(precision for precision, _, _ in sizes))
    figure, axes = report.figure(len(precisions), 1, size=(13, 1.6 + 3 * len(precisions)))
    for precision, (axis,) in zip(precisions, axes, strict=True):
        cells = {f"{b:,} x {c:,}": cell for (p, b, c), cell in sizes.items() if p == precision}
        speed: dict[str, list[float]] = {}
        ends: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            shares = [
                {k: v / cell[base]["tokens_per_second"]["median"] for k, v in cell[name]["tokens_per_second"].items()}
                for cell in cells.values()
            ]
            speed[MODELS[name].label] = [share["median"] for share in shares]
            ends[MODELS[name].label] = [(share["lower"], share["upper"]) for share in shares]
        report.grouped_bars(axis, list(cells), speed, colours=colours, errors=ends, reference=1.0)
        axis.set_ylabel(f"tokens/s relative to {MODELS[base].label}")
        axis.set_title(f"{precision}, rows x tokens of the prompt (whiskers: middle half of rounds)", fontsize=10)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False)
    cache = content["settings"]["cache"]
    heading = f"generate after the prompt, equal parameters, {cache} cache"
    figure.suptitle(f"{heading}\n{report.describe(content['environment'])}", fontsize=11)
    report.write_plot(path, figure)
