"""What every benchmark reports with: the machine it ran on, tables, JSON files and pictures."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# CPU instructions that decide how fast a benchmark runs, as /proc/cpuinfo names them.
_TELLING_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16")

# Told apart by people with any colour vision (Okabe and Ito); grey is for what is only there to compare with.
COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#f0e442", "#000000")
GREY = "#999999"


class Spread(NamedTuple):
    """The middle half of repeated measurements."""

    median: float
    lower: float  # first quartile
    upper: float  # third quartile


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; one value is its own spread.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("spread: there is nothing to summarise; measure at least once")
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, lower, upper)


def half_spread(spread: Mapping[str, float]) -> float:
    """Half of the middle half's width, in per cent of the median; of a :class:`Spread` as JSON has it."""
    return 50 * (spread["upper"] - spread["lower"]) / spread["median"]


def environment(module: str, device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """What someone needs to know to judge a result or to repeat it.

    Args:
        module: the benchmark as ``python -m`` takes it.
        device: what it ran on.
        packages: distributions whose versions matter; those not installed are null.

    Returns:
        A dictionary for JSON: date (UTC), command, device, CPU, threads, load, memory, versions, git commit.
    """
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        **_cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": physical_memory(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "git": _git(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return found


def _cpu() -> dict[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {"cpu": platform.processor() or platform.machine(), "cpu_flags": []}
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return {"cpu": model, "cpu_flags": [flag for flag in _TELLING_FLAGS if flag in flags]}


def physical_memory() -> int | None:
    """Bytes of memory that the machine has, or None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """The commit that is checked out, and whether files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(env: Mapping[str, Any]) -> str:
    """One line for people about an :func:`environment`: machine, threads, versions, commit."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    commit = f", commit {env['git']['commit'][:10]}{' + changes' if env['git']['dirty'] else ''}" if env["git"] else ""
    machine = env["cpu"] if env["device"] == "cpu" else env["device"]
    return f"{machine}, {env['threads']} threads, {versions}{commit}, {env['date'][:10]}"


def busy_warning(env: Mapping[str, Any]) -> str | None:
    """A warning if other work had the machine's cores when the benchmark began, else None."""
    load = env["load_average_1_minute"]
    if load is None or load < 0.5:
        return None
    return (
        f"the machine was busy before the benchmark began (load average {load} on {env['cores']} cores): "
        "times may be off; repeat on an idle machine before quoting them"
    )


def progress(console: Console) -> Progress:
    """A progress bar: what is being measured, how many of how many, time passed and left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> Table:
    """A table of results.

    Args:
        title: above the table.
        columns: headings; two short lines leave room for more columns.
        rows: cells, as text.
        text_columns: that many first columns are words, aligned left; the others are numbers, aligned right.
    """
    built = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, collapse_padding=True)
    for i, heading in enumerate(columns):
        built.add_column(heading, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        built.add_row(*row)
    return built


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name and rename it: readers find the old file or the new one, never a part."""
    _write(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def write_picture(path: Path, figure: Figure) -> None:
    """Save a matplotlib figure as PNG, in the same way, and close it."""
    from matplotlib import pyplot as plt

    _write(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    plt.close(figure)


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def figure(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns), drawn without a display. ``size`` is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def grouped_bars(
    axes: Axes,
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    colours: Mapping[str, str],
    label: Callable[[float], str] = "{:.2f}".format,
    errors: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    reference: float | None = None,
) -> None:
    """Draw one bar for each series in each group, with its value on top.

    Args:
        axes: where to.
        groups: names along the x axis.
        series: name -> one value for each group.
        colours: name -> colour.
        label: how a value is written.
        errors: name -> (lower, upper) end of the whisker for each group.
        reference: a dashed line at this value.
    """
    width = 0.85 / len(series)
    top = max(max(values) for values in series.values())
    if errors is not None:
        top = max(top, max(upper for ends in errors.values() for _, upper in ends))
    for i, (name, values) in enumerate(series.items()):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        axes.bar(at, values, width * 0.94, color=colours[name], label=name)
        tops = list(values)
        if errors is not None:
            ends = errors[name]
            tops = [upper for _, upper in ends]
            below = [value - lower for value, (lower, _) in zip(values, ends, strict=True)]
            above = [upper - value for value, (_, upper) in zip(values, ends, strict=True)]
            axes.errorbar(at, values, yerr=[below, above], fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2)
        for x, y, value in zip(at, tops, values, strict=True):
            axes.text(x, y + 0.012 * top, label(value), ha="center", va="bottom", fontsize=7)
    if reference is not None:
        axes.axhline(reference, color="#555555", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_xticks(range(len(groups)), groups)
    axes.set_ylim(0, 1.12 * top)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
