"""The tables, the aims and the picture of the attention benchmark, from the figures in its JSON
file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from benchmarks.attention_contenders import CONTENDERS
from benchmarks.attention_problems import LAYOUTS, Layout, describe
from benchmarks.kernel_report import DIRECTIONS, MEBIBYTE, floor_row, print_limits
from benchmarks.lib import report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = Mapping[str, Any]

_COLOURS = {
    "triton": report.COLOURS[0],
    "triton_fast": report.COLOURS[1],
    "sdpa": report.COLOURS[5],
    "flash": report.COLOURS[7],
    "four": report.COLOURS[4],
    "two": report.COLOURS[3],
    "flex": report.COLOURS[2],
    "naive": report.GREY,
}


@dataclass(frozen=True)
class Aim:
    """What the fused kernel is meant to reach on a GPU, in bf16, at every size it speaks of."""

    text: str
    measure: str
    """"speed": how many times faster than the best rival, forward and backward together;
    "peak_bytes": how much of the least rival's memory.
    """
    bound: float
    rivals: Sequence[str]
    widths: Sequence[tuple[int, int]] = ()
    """(D, Dv); none named is all."""
    masks: Sequence[str] = ("causal",)
    least_length: int = 1
    most_length: int = 1 << 62

    def speaks_of(self, layout: Layout, length: int) -> bool:
        """Whether it is about that size."""
        mask = "window" if layout.window else "packed" if layout.packed else "causal"
        fits = not self.widths or (layout.width, layout.value_width) in self.widths
        return fits and mask in self.masks and self.least_length <= length <= self.most_length

    def ratio(self, ours: Result, rivals: Sequence[Result]) -> float:
        """The measured figure."""
        if self.measure == "peak_bytes":
            return float(ours["peak_bytes"] / min(r["peak_bytes"] for r in rivals))
        return float(min(r["seconds"]["both"]["median"] for r in rivals) / ours["seconds"]["both"]["median"])

    def met(self, ratio: float) -> bool:
        """Whether a figure is good enough."""
        return ratio <= self.bound if self.measure == "peak_bytes" else ratio >= self.bound


# flash-attn's own kernels, where they are installed, are such a composition as well.
_FOUR_CALLS = ("four", "flash")
_ALL_MASKS = ("causal", "window", "packed")
GPU_AIMS = (
    Aim(
        "at least 1.3 times the best four calls, 4K to 16K", "speed", 1.3, _FOUR_CALLS, [(64, 128)], ["causal"],
        4096, 16384,
    ),
    Aim(
        "at least 1.0 times the best four calls, 4K to 16K", "speed", 1.0, _FOUR_CALLS, [(128, 256)], ["causal"],
        4096, 16384,
    ),
    Aim("at least 1.5 times the best four calls on windows", "speed", 1.5, _FOUR_CALLS, masks=["window"]),
    Aim("peak memory at most that of two calls", "peak_bytes", 1.0, ("two",), masks=_ALL_MASKS),
)  # fmt: skip


def judge(results: Sequence[Result], device: torch.device) -> list[dict[str, Any]]:
    """Hold the fused kernel, in either mode, to the aims: for each layout the worst of its sizes.

    What was not measured is not judged, and nothing is on a CPU, where the kernel does not run.
    """
    cells: dict[tuple[str, int], list[Result]] = {}
    for r in results:
        if r["dtype"] == "bf16" and "both" in r["seconds"]:
            cells.setdefault((r["layout"], r["length"]), []).append(r)
    judged = []
    for aim in GPU_AIMS if device.type == "cuda" else ():
        for contender in ("triton", "triton_fast"):
            ratios: dict[str, list[tuple[float, int]]] = {}
            for (name, length), cell in cells.items():
                ours = [r for r in cell if r["contender"] == contender]
                rivals = [r for r in cell if r["contender"] in aim.rivals]
                if ours and rivals and aim.speaks_of(LAYOUTS[name], length):
                    ratios.setdefault(name, []).append((aim.ratio(ours[0], rivals), length))
            for name, found in ratios.items():
                worst, length = max(found) if aim.measure == "peak_bytes" else min(found)
                judged.append(
                    {
                        "layout": name,
                        "contender": contender,
                        "aim": aim.text,
                        "measure": aim.measure,
                        "bound": aim.bound,
                        "lengths": sorted(length for _, length in found),
                        "worst": worst,
                        "worst_at": length,
                        "met": aim.met(worst),
                    }
                )
    return judged


def mark_best(results: Sequence[dict[str, Any]]) -> None:
    """Set "best" on each contender's fastest kernel, forward and backward together, of one
    problem's results.
    """
    fastest: dict[str, Result] = {}
    for r in results:
        best = fastest.get(r["contender"])
        if best is None or _seconds(r) < _seconds(best):
            fastest[r["contender"]] = r
    for r in results:
        r["best"] = fastest[r["contender"]] is r


def _seconds(result: Result) -> float:
    seconds = result["seconds"]  # by direction, or where there is only one, of that
    return float(seconds.get("both", seconds.get("forward", seconds))["median"])


def label(result: Result, labels: Mapping[str, str] = CONTENDERS) -> str:
    """Contender, kernel and what was done to its inputs."""
    details = ", ".join(filter(None, (result["variant"], result["form"])))
    return labels[result["contender"]] + (f" ({details})" if details else "")


def print_results(console: Console, content: Mapping[str, Any]) -> None:
    """The tables, of each contender's best kernel; the refusals and the aims."""
    cuda = content["environment"]["device"] != "cpu"
    unit, scale = ("µs", 1e6) if cuda else ("ms", 1e3)
    work, tera = _rate_unit(content)
    print_limits(console, content)
    for (name, dtype), results in _groups(content["results"]).items():
        times, rates = [], []
        for i, r in enumerate(results):
            new = i == 0 or results[i - 1]["length"] != r["length"]
            head = (f"{r['length']:,}" if new else "", label(r))
            spreads = [r["seconds"].get(d) for d in DIRECTIONS]
            cells = [
                (f"{scale * s['median']:,.1f}", f"{report.half_spread(s):.0f}%") if s else ("-", "") for s in spreads
            ]
            times.append((*head, *(text for pair in cells for text in pair)))
            if i + 1 == len(results) or results[i + 1]["length"] != r["length"]:
                times.append(("", *floor_row(scale, r["floor_seconds"])))
            peak = "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / MEBIBYTE:,.1f}"
            done = [f"{tera * r['tflops'][d]:,.1f}" if d in r["tflops"] else "-" for d in DIRECTIONS]
            shares = [f"{100 * r['share_of_floor'][d]:.0f}%" if d in r["share_of_floor"] else "" for d in DIRECTIONS]
            rates.append((*head, *(text for pair in zip(done, shares, strict=True) for text in pair), peak))
        tokens = sorted({r["tokens"] for r in results})
        title = f"{describe(LAYOUTS[name])}, {dtype}, {' or '.join(f'{t:,}' for t in tokens)} tokens"
        headings = [text for d in ("fwd", "bwd", "both") for text in (f"{d}\n{unit}", "±")]
        console.print(report.table(f"{title}: time", ["length", "", *headings], times, text_columns=2))
        headings = [*(text for d in ("fwd", "bwd", "both") for text in (f"{d}\n{work}", "of\nfloor")), "peak\nMiB"]
        console.print(report.table(f"{title}: work and memory", ["length", "", *headings], rates, text_columns=2))
    for r in content["refused"]:
        size = f"{describe(LAYOUTS[r['layout']])}, {r['dtype']}, {r['length']:,}"
        console.print(f"[red]refused[/red] {label(r)} at {size}: {r['reason']}", soft_wrap=True)
    if content["not_begun"]:
        names = "; ".join(f"{c['layout']} {c['dtype']} {c['length']:,}" for c in content["not_begun"])
        console.print(f"[yellow]not begun, for the time was over[/yellow]: {names}", soft_wrap=True)
    for aim in content["aims"]:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        console.print(
            f"{verdict}  {describe(LAYOUTS[aim['layout']])}, {CONTENDERS[aim['contender']]}: {aim['aim']}: "
            f"[bold]{aim['worst']:.2f}[/bold] at worst ({aim['worst_at']:,})",
            soft_wrap=True,
        )
    if not content["aims"]:
        console.print("No aim was judged: that takes a full run on a GPU.")


def _rate_unit(content: Mapping[str, Any]) -> tuple[str, float]:
    """Its name, and how many of it a TFLOP/s is."""
    return ("TFLOP/s", 1.0) if content["environment"]["device"] != "cpu" else ("GFLOP/s", 1e3)


def _groups(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """The best results by layout and dtype, the shortest sequences first."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        if r["best"]:
            groups.setdefault((r["layout"], r["dtype"]), []).append(r)
    return {key: sorted(found, key=lambda r: r["length"]) for key, found in groups.items()}


def draw(path: Path, content: Mapping[str, Any]) -> None:
    """The picture: for each layout the work done a second in each direction by length, and peak
    memory.
    """
    groups, (unit, tera) = _groups(content["results"]), _rate_unit(content)
    names = [name for name in CONTENDERS if any(r["contender"] == name for found in groups.values() for r in found)]
    figure, axes = report.figure(len(groups), 4, size=(20, 1.4 + 2.9 * len(groups)))
    for ((name, dtype), results), line in zip(groups.items(), axes, strict=True):
        lengths = sorted({r["length"] for r in results})
        cells = {(r["contender"], r["length"]): r for r in results}
        title = f"{describe(LAYOUTS[name])}, {dtype}"
        for axis, panel in zip(line, (*DIRECTIONS, "peak memory"), strict=True):
            series = {who: [_value(cells.get((who, n)), panel, tera) for n in lengths] for who in names}
            _panel(axis, lengths, {who: values for who, values in series.items() if any(values)}, panel)
            axis.set_title(f"{title}: {panel}", fontsize=9)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel(unit)
        line[3].set_ylabel("MiB")
        line[0].set_xlabel("longest document" if LAYOUTS[name].packed else "sequence length", fontsize=8)
    from matplotlib.patches import Patch

    handles = [Patch(color=_COLOURS[name], label=CONTENDERS[name]) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False)
    heading = "causal differential attention; work is counted by the mathematics"
    figure.suptitle(f"{heading}\n{report.describe(content['environment'])}", fontsize=11)
    report.write_plot(path, figure)


def _value(result: Result | None, panel: str, tera: float) -> float:
    """What a panel shows; 0 where there is nothing."""
    if result is None:
        return 0.0
    if panel == "peak memory":
        return float(result["peak_bytes"] or 0) / MEBIBYTE
    return tera * float(result["tflops"].get(panel, 0.0))


def _panel(axis: Axes, lengths: Sequence[int], series: Mapping[str, Sequence[float]], panel: str) -> None:
    """Lines over three lengths or more, else bars."""
    if not series:
        axis.set_axis_off()
    elif len(lengths) < 3:
        report.grouped_bars(axis, [f"{n:,}" for n in lengths], series, colours=_COLOURS, label=_short)
    else:
        for who, values in series.items():
            points = [(n, value) for n, value in zip(lengths, values, strict=True) if value]
            axis.plot(*zip(*points, strict=True), color=_COLOURS[who], marker="o", markersize=4, linewidth=1.4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axis.minorticks_off()
        if panel == "peak memory":
            axis.set_yscale("log", base=2)  # maps in memory leave nothing of the others to be seen
            axis.yaxis.set_major_formatter("{x:,.0f}")
        else:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}" if value else ""
