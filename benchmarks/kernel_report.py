"""The tables, the aims and the picture of a kernel benchmark, from the figures in its JSON file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import report
from benchmarks.timing import Limits

MEBIBYTE = 1 << 20
DIRECTIONS = ("forward", "backward", "both")


def add_rates(result: dict[str, Any], limits: Limits) -> None:
    """Add what the times of a result mean: its bandwidth, its floor, and the share of either that
    it reached.
    """
    seconds = {d: result["seconds"][d]["median"] for d in DIRECTIONS}
    rates = {d: result["bytes"][d] / seconds[d] for d in DIRECTIONS}
    floors = {d: limits.floor(result["bytes"][d]) for d in DIRECTIONS}
    result["gb_per_second"] = {d: rate * 1e-9 for d, rate in rates.items()}
    result["copy_share"] = {d: rate / limits.bytes_per_second for d, rate in rates.items()}
    result["floor_seconds"] = {d: floor._asdict() for d, floor in floors.items()}
    result["share_of_floor"] = {d: floor.floor / seconds[d] for d, floor in floors.items()}


@dataclass(frozen=True)
class Aim:
    """What ours is meant to reach, at every size it speaks of."""

    text: str
    measure: str
    """"copy_share", "speed" (how many times faster than the rival) or "peak_bytes"
    (the share of the rival's).
    """
    bound: float
    directions: Sequence[str] = ("both",)
    rival: str = "ours"
    least_rows: int = 1
    least_columns: int = 1
    dtype: str = "bf16"
    above: bool = False
    """The bound itself is not enough."""
    functions: Sequence[str] = ()
    """Whom it speaks of; none named is all."""

    def ratio(self, ours: Mapping[str, Any], rival: Mapping[str, Any], direction: str) -> float:
        """The measured figure."""
        if self.measure == "copy_share":
            return float(ours["copy_share"][direction])
        if self.measure == "speed":
            return float(rival["seconds"][direction]["median"] / ours["seconds"][direction]["median"])
        return float(ours["peak_bytes"] / rival["peak_bytes"])

    def met(self, ratio: float) -> bool:
        """Whether a figure is good enough."""
        if self.measure == "peak_bytes":
            return ratio <= self.bound
        return ratio > self.bound if self.above else ratio >= self.bound


# Below these, a kernel is over before the memory system is busy.
_ROWS, _COLUMNS = 8192, 4096
GPU_AIMS = (
    Aim("at least 80% of copy bandwidth", "copy_share", 0.8, ("forward", "backward"), "ours", _ROWS, _COLUMNS),
    Aim("at least 1.3 times torch.compile", "speed", 1.3, ("forward",), "compile", _ROWS, _COLUMNS),
    Aim("at least 3 times torch.compile", "speed", 3.0, ("backward",), "compile", _ROWS, _COLUMNS),
    Aim("ahead of liger-kernel at every size", "speed", 1.0, DIRECTIONS, "liger", above=True),
)
CPU_AIMS = (
    Aim(
        text="peak memory at most half of eager's",
        measure="peak_bytes",
        bound=0.5,
        rival="eager",
        least_rows=2048,
        least_columns=8192,
        dtype="float32",
        functions=("poly_norm", "mul_poly_norm"),
    ),
)


def judge(results: Sequence[Mapping[str, Any]], device: torch.device) -> list[dict[str, Any]]:
    """Hold results to the aims of the device: for each function, aim and direction, the worst of
    its sizes.

    What was not measured is not judged.
    """
    cells = {(r["function"], r["dtype"], r["rows"], r["columns"], r["contender"]): r for r in results}
    judged = []
    for function in dict.fromkeys(r["function"] for r in results):
        for aim in GPU_AIMS if device.type == "cuda" else CPU_AIMS:
            if aim.functions and function not in aim.functions:
                continue
            pairs = [
                (r, cells[rival])
                for r in results
                if (r["function"], r["dtype"], r["contender"]) == (function, aim.dtype, "ours")
                and r["rows"] >= aim.least_rows
                and r["columns"] >= aim.least_columns
                and (rival := (function, aim.dtype, r["rows"], r["columns"], aim.rival)) in cells
            ]
            for direction in aim.directions if pairs else ():
                ratios = [(aim.ratio(ours, rival, direction), ours) for ours, rival in pairs]
                worst = max if aim.measure == "peak_bytes" else min
                ratio, at = worst(ratios, key=lambda pair: pair[0])
                judged.append(
                    {
                        "function": function,
                        "aim": aim.text,
                        "direction": direction,
                        "measure": aim.measure,
                        "dtype": aim.dtype,
                        "bound": aim.bound,
                        "sizes": len(pairs),
                        "worst": ratio,
                        "worst_at": {"rows": at["rows"], "columns": at["columns"]},
                        "met": aim.met(ratio),
                    }
                )
    return judged


def _groups(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """Results by function, dtype and rows, in order."""
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for r in results:
        groups.setdefault((r["function"], r["dtype"], r["rows"]), []).append(r)
    return groups


def print_limits(console: Console, content: Mapping[str, Any]) -> None:
    """What floors are reckoned from."""
    console.print(f"copy bandwidth: {content['copy']['gb_per_second']:,.1f} GB/s, read and written")
    if matrix := content.get("matrix"):
        rates = ", ".join(f"{name} {rate:,.3g}" for name, rate in matrix["tflops"].items())
        console.print(f"matrix products of {matrix['size']:,}: {rates} TFLOP/s")


def floor_row(scale: float, floors: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    """A table of times' last row for a size: its name and, for each direction, the floor and an
    empty spread.
    """
    limiting = {"bytes" if f["floor"] == f["bytes"] else "operations" for f in floors.values()}
    times = [text for d in DIRECTIONS for text in (f"{scale * floors[d]['floor']:,.1f}", "")]
    return (f"floor, by {' or '.join(sorted(limiting))}", *times)


def print_results(console: Console, content: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """The tables of times and of bandwidth and memory, the refusals and the aims."""
    unit, scale = ("µs", 1e6) if content["environment"]["device"] != "cpu" else ("ms", 1e3)
    print_limits(console, content)
    for (function, dtype, rows), results in _groups(content["results"]).items():
        times, rates = [], []
        for i, r in enumerate(results):
            head = (f"{r['columns']:,}", labels[r["contender"]])
            spreads = [r["seconds"][d] for d in DIRECTIONS]
            cells = [(f"{scale * s['median']:,.1f}", f"±{report.half_spread(s):.0f}%") for s in spreads]
            times.append((*head, *(text for pair in cells for text in pair)))
            if i + 1 == len(results) or results[i + 1]["columns"] != r["columns"]:
                times.append((head[0], *floor_row(scale, r["floor_seconds"])))
            rates.append(
                (
                    *head,
                    *(f"{r['gb_per_second'][d]:,.1f}" for d in DIRECTIONS),
                    *(f"{100 * r['copy_share'][d]:.0f}%" for d in DIRECTIONS),
                    f"{r['saved_bytes']['beyond_inputs'] / MEBIBYTE:,.1f}",
                    f"{r['peak_bytes'] / MEBIBYTE:,.1f}",
                )
            )
        title = f"{function}, {dtype}, {rows:,} rows"
        headings = [f"forward\n{unit}", "middle\nhalf", f"backward\n{unit}", "middle\nhalf"]
        headings += [f"both\n{unit}", "middle\nhalf"]
        console.print(report.table(f"{title}: time", ["row\nlength", "", *headings], times, text_columns=2))
        headings = [
            "fwd\nGB/s",
            "bwd\nGB/s",
            "both\nGB/s",
            "of\nfloor",
            "of\nfloor",
            "of\nfloor",
            "saved\nMiB",
            "peak\nMiB",
        ]
        console.print(
            report.table(f"{title}: bandwidth and memory", ["row\nlength", "", *headings], rates, text_columns=2)
        )
    for r in content["refused"]:
        size = f"{r['function']}, {r['dtype']}, {r['rows']:,} x {r['columns']:,}"
        console.print(f"[red]refused[/red] {labels[r['contender']]} at {size}: {r['reason']}", soft_wrap=True)
    for aim in content["aims"]:
        verdict = "[green]met[/green]    " if aim["met"] else "[red]not met[/red]"
        size = f"{aim['worst_at']['rows']:,} x {aim['worst_at']['columns']:,}"
        console.print(
            f"{verdict}  {aim['function']}, {aim['dtype']}, {aim['direction']}: {aim['aim']}: "
            f"[bold]{aim['worst']:.2f}[/bold] at worst ({size})",
            soft_wrap=True,
        )
    if not content["aims"]:
        console.print("No aim was judged: that takes a full run at large sizes, and for most of them a GPU.")


def draw(path: Path, content: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    """The picture: shares of the copy bandwidth for each direction, and peak memory.

    A function that was measured at several row lengths has a row of panels; those of one length
    share one.
    """
    results = content["results"]
    lengths: dict[str, set[int]] = {}
    for r in results:
        lengths.setdefault(r["function"], set()).add(r["columns"])
    panels: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}  # title -> group -> contender -> result
    for r in results:
        if len(lengths[r["function"]]) > 1:
            title, group = f"{r['function']}, {r['dtype']}, {r['rows']:,} rows", f"{r['columns']:,}"
        else:
            title = f"{r['dtype']}, {r['rows']:,} rows"
            group = f"{r['function'].replace(', ', chr(10))}\n{r['columns']:,}"
        panels.setdefault(title, {}).setdefault(group, {})[r["contender"]] = r

    names = [name for name in content["contenders"] if any(r["contender"] == name for r in results)]
    fixed = {"eager": report.GREY, "compile": report.COLOURS[3], "liger": report.COLOURS[2], "ours": report.COLOURS[0]}
    colours = {labels[name]: fixed[name] for name in names}
    figure, axes = report.figure(len(panels), 4, size=(20, 1.4 + 2.9 * len(panels)))
    for (title, groups), line in zip(panels.items(), axes, strict=True):
        for direction, axis in zip(DIRECTIONS, line, strict=False):
            shares, ends = {}, {}
            for name in names:
                row = [_share(cell.get(name), direction) for cell in groups.values()]
                shares[labels[name]] = [share[0] for share in row]
                ends[labels[name]] = [share[1:] for share in row]
            report.grouped_bars(
                axis, list(groups), shares, colours=colours, errors=ends, reference=100.0, label=_whole_number
            )
            axis.set_title(f"{title}: {direction}", fontsize=9)
        line[0].set_ylabel("% of copy bandwidth")
        memory = {
            labels[name]: [cell[name]["peak_bytes"] / MEBIBYTE if name in cell else 0.0 for cell in groups.values()]
            for name in names
        }
        report.grouped_bars(line[3], list(groups), memory, colours=colours, label=_whole_number)
        line[3].set_title(f"{title}: peak memory", fontsize=9)
        line[3].set_ylabel("MiB")
        for axis in line:
            axis.tick_params(axis="x", labelsize=8)
    handles, texts = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=len(texts), frameon=False)
    copy = f"a copy moves {content['copy']['gb_per_second']:,.0f} GB/s; whiskers: middle half of the repetitions"
    figure.suptitle(f"{content['benchmark']}: {copy}\n{report.describe(content['environment'])}", fontsize=11)
    report.write_plot(path, figure)


def _share(result: Mapping[str, Any] | None, direction: str) -> tuple[float, float, float]:
    """Per cent of the copy bandwidth: median, and the ends of the middle half."""
    if result is None:
        return 0.0, 0.0, 0.0
    share, seconds = 100 * result["copy_share"][direction], result["seconds"][direction]
    return share, share * seconds["median"] / seconds["upper"], share * seconds["median"] / seconds["lower"]


def _whole_number(value: float) -> str:
    return f"{value:,.0f}" if value else ""
