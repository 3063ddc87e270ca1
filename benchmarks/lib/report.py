"""What every benchmark reports with: the machine it ran on, tables, JSON files and plots."""

import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from motifarch.environment import environment as machine
from motifarch.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# Told apart by people with any colour vision (Okabe and Ito); grey is for what is only there to
# compare with.
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
    """Half of the middle half's width, in per cent of the median."""
    return 50 * (spread["upper"] - spread["lower"]) / spread["median"]


def environment(module: str, device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """What someone needs to know to judge a result or to repeat it.

    Args:
        module: the benchmark as ``python -m`` takes it.
        device: what it ran on.
        packages: distributions whose versions matter; those not installed are null.
    """
    return machine(shlex.join(["python", "-m", module, *sys.argv[1:]]), device, packages)


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


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> Table:
    """A table of results.

    Args:
        title: above the table.
        columns: headings; two short lines leave room for more columns.
        rows: cells, as text.
        text_columns: that many first columns are words, aligned left; the others are numbers,
            aligned right.
    """
    built = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE, collapse_padding=True)
    for i, heading in enumerate(columns):
        built.add_column(heading, justify="left" if i < text_columns else "right", no_wrap=True)
    for row in rows:
        built.add_row(*row)
    return built


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, a line for each result, under a temporary name that then replaces the file's."""
    parts = []
    for name, value in content.items():
        text = json.dumps(value)
        if isinstance(value, list) and value and isinstance(value[0], (dict, str)):
            text = "[\n    " + ",\n    ".join(map(json.dumps, value)) + "\n  ]"
        parts.append(f"  {json.dumps(name)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write("{\n" + ",\n".join(parts) + "\n}\n")


def write_plot(path: Path, figure: "Figure") -> None:
    """Save a matplotlib figure as PNG, in the same way, and close it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=100, format="png")
    plt.close(figure)


def figure(rows: int, columns: int, *, size: tuple[float, float]) -> tuple["Figure", Any]:
    """A figure and its axes, (rows, columns), drawn without a display. ``size`` is in inches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def grouped_bars(
    axes: "Axes",
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    colours: Mapping[str, str],
    errors: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> None:
    """Draw one bar for each series in each group, with its value on top.

    Args:
        axes: where to.
        groups: names along the x axis.
        series: name -> one value for each group.
        colours: name -> colour.
        errors: name -> (lower, upper) end of the whisker for each group.
    """
    width = 0.85 / len(series)
    for i, (name, values) in enumerate(series.items()):
        at = [group + (i - (len(series) - 1) / 2) * width for group in range(len(groups))]
        whiskers = None
        if errors is not None:
            pairs = list(zip(values, errors[name], strict=True))
            whiskers = [[value - lower for value, (lower, _) in pairs], [upper - value for value, (_, upper) in pairs]]
        style = {"ecolor": "#333333", "elinewidth": 0.8, "capsize": 2}
        bars = axes.bar(at, values, width * 0.94, color=colours[name], label=name, yerr=whiskers, error_kw=style)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
