"""The plots of a study's report, by matplotlib, as SVG to stand in a page."""

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from motifarch.study.analysis import ACTIVATIONS, StudyResults, Variant
from motifarch.study.designs import StudyDesigns
from motifarch.study.figure_data import shown_data
from motifarch.train.plots import smooth

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "motifarch",  # the same results make the same page
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Plot:
    """A plot, to stand in a page or alone."""

    name: str
    """Of its files."""
    svg: str
    data: pd.DataFrame
    """The numbers in it, as :func:`motifarch.study.figure_data.shown_data` has them."""


def draw(plot: Callable[..., None], study: StudyResults, *args: Any) -> Plot | None:
    """One of the plots below; None without data."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(8, 4), layout="constrained")
        plot(figure, study, *args)
        if not any(axes.has_data() for axes in figure.axes):
            return None
        data = shown_data(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    words = [plot.__name__, *(arg for arg in args if isinstance(arg, str))]
    return Plot("_".join(words), svg, data)


def by_ratio(figure: Figure, study: StudyResults, size: str) -> None:
    """Every variant's loss with its interval and single seeds; a line joins rising head ratios."""
    axes = figure.subplots()
    shown = [v for v in study.variants if v.size == size and study.loss(v)]
    labels = list(dict.fromkeys(v.label for v in shown))
    for v in shown:
        at, loss = labels.index(v.label) + 0.25 * study.activations.index(v.activation), study.loss(v)
        assert loss is not None
        style = _style(study, v)
        axes.errorbar(at, loss.mean, yerr=loss.half or 0, capsize=4, markersize=7, **style)
        seeds = list(study.values(v, "validation_loss").values())
        axes.plot([at + 0.1] * len(seeds), seeds, ".", color="0.5", markersize=4, label=f"{style['label']}, seeds")
    for group in study.groups(size):
        shift = 0.25 * study.activations.index(group[0].activation)
        points = [(labels.index(v.label) + shift, loss.mean) for v in study.ratios(group) if (loss := study.loss(v))]
        if points:
            axes.plot(*zip(*points, strict=True), color="0.5", linewidth=1, zorder=0)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("validation loss, nats/token")


def by_design(figure: Figure, study: StudyResults, designs: StudyDesigns) -> None:
    """Loss over the head ratio, a panel for each design and size."""
    shown = [design for design in designs.all if any(map(study.loss, design.variants))]
    if not shown:
        return
    rows = -(-len(shown) // 3)
    columns = -(-len(shown) // rows)
    figure.set_size_inches(1 + 2.7 * columns, 0.6 + 2.8 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flat
    first: dict[str, Axes] = {}
    for axes, design in zip(panels, shown, strict=False):
        axes.sharey(first.setdefault(design.size, axes))
        losses = [(v, loss) for v in design.variants if (loss := study.loss(v))]
        at, attention = [v.ratio for v, _ in losses], design.variants[0].label.split()[0]
        means, halves = [loss.mean for _, loss in losses], [loss.half or 0 for _, loss in losses]
        axes.errorbar(at, means, yerr=halves, color="C0", marker="o", capsize=4, label=attention)
        for v, _ in losses:
            seeds = list(study.values(v, "validation_loss").values())
            beside = [1.08 * (v.ratio or 1)] * len(seeds)
            axes.plot(beside, seeds, ".", color="0.4", markersize=6, label=f"{v.label}, seeds")
        for i, (label, level) in enumerate(_without_ratio(study, design.size)):
            axes.axhline(level, color=f"C{i + 1}", linestyle="--", linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_xticks([v.ratio for v in design.variants])
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}:1")
        axes.set_title(f"{design.name}, {design.size}" if len(study.sizes) > 1 else design.name)
        axes.set_xlabel("signal heads for each noise head")
        axes.set_ylabel("validation loss, nats/token")
    for axes in figure.axes[len(shown) :]:
        axes.remove()
    _legend(figure)


def _without_ratio(study: StudyResults, size: str) -> Iterator[tuple[str, float]]:
    """Yields each attention without a choice of ratio, and its loss with the better activation."""
    others = [v for v in study.of_size(size) if v.ratio is None]
    for label in dict.fromkeys(v.label for v in others):
        best = study.best([v for v in others if v.label == label])
        if best and (loss := study.loss(best)):
            yield label, loss.mean


def by_cost(figure: Figure, study: StudyResults, size: str) -> None:
    """Loss at the end over what it took: training FLOPs, time at the speeds that were measured side
    by side (else the runs' own), and the cache.
    """
    panels = figure.subplots(1, 3, sharey=True)
    figure.set_size_inches(9, 4.5)
    for v in (v for v in study.of_size(size) if study.loss(v)):
        loss, runs = study.loss(v), study.runs_of(v)
        assert loss is not None
        tokens = float(np.mean([run["tokens"] for run in runs]))
        if (rate := study.seconds_per_token(v)) is not None:
            took = tokens * rate
        else:
            _, seconds, _ = _mean_curve(runs, "validation")
            took = seconds[-1] if seconds.size else np.nan
        places = tokens * v.row["training_flops_per_token"], took, v.row["kv_bytes_per_token"]
        for axes, place in zip(panels, places, strict=True):
            axes.errorbar(place, loss.mean, yerr=loss.half or 0, capsize=3, **_style(study, v))
    for axes, label in zip(panels, ("training FLOPs", "seconds of training", "cache, bytes a token"), strict=True):
        axes.set_xlabel(label)
    panels[0].set_ylabel("validation loss, nats/token")
    _legend(figure)


def learning_rates(figure: Figure, study: StudyResults) -> None:
    """Losses of the sweep by learning rate, a panel for each size; a line is the rate taken."""
    sweep = [r for r in study.results.get("sweep") or () if r["status"] == "finished"]
    sizes = [size for size in study.sizes if any(r["size"] == size for r in sweep)]
    if not sizes:
        return
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    figure.set_size_inches(max(8, 1 + 4 * len(sizes)), 5)
    for axes, size in zip(panels, sizes, strict=True):
        for v in study.of_size(size):
            points = sorted(
                (r["learning_rate"], r["validation_loss"]) for r in sweep if (r["variant"], r["size"]) == (v.name, size)
            )
            if points:
                style = _style(study, v)
                axes.plot(*zip(*points, strict=True), markersize=4, **style)
                if v.row.get("learning_rate"):
                    axes.axvline(v.row["learning_rate"], color=style["color"], linewidth=0.6)
        axes.set_xscale("log")
        axes.set_xticks(sorted({r["learning_rate"] for r in sweep if r["size"] == size}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="peak learning rate", ylabel="validation loss of a short run", title=size)
    _legend(figure)


def differences(figure: Figure, study: StudyResults) -> None:
    """Paired differences: own intervals thin, those from the noise of all variants thick."""
    shown = [c for c in study.comparisons if c.difference]
    axes = figure.subplots()
    figure.set_figheight(1 + 0.3 * len(shown))
    names = [f"{study.title(c.variant)} − {study.title(c.reference)}" for c in reversed(shown)]
    for at, (c, name) in enumerate(zip(reversed(shown), names, strict=True)):
        assert c.difference is not None
        style = _style(study, c.variant) | {"label": name}
        axes.errorbar(c.difference.mean, at, xerr=c.difference.half or 0, capsize=4, **style)
        if c.shared and c.shared.half:
            shared = {"color": style["color"], "label": f"{name}, shared noise"}
            axes.errorbar(c.shared.mean, at, xerr=c.shared.half, elinewidth=4, alpha=0.4, **shared)
    axes.set_yticks(range(len(shown)), names, parse_math=False)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_xlabel("difference in validation loss, nats/token (left of 0: lower)")


def curves(figure: Figure, study: StudyResults, size: str) -> None:
    """Training loss (smoothed), validation loss less the reference's, and loss against time."""
    figure.set_size_inches(8, 10)
    training, validation, timed = figure.subplots(3)
    for group in study.groups(size):
        reference = study.runs_of(study.reference(group))
        for v in (v for v in group if study.runs_of(v)):
            runs, style = study.runs_of(v), _style(study, v) | {"marker": ""}
            at, _, loss = _mean_curve(runs, "curve")
            training.plot(at, smooth(list(loss), 1 - 1 / min(50, 1 + len(loss) / 25)), **style)
            # Seeds that only one has finished would add what seeds do.
            seeds = {run["seed"] for run in runs} & {run["seed"] for run in reference}
            pair = [_mean_curve([r for r in found if r["seed"] in seeds], "validation") for found in (runs, reference)]
            if len(group) > 1 and all(map(np.size, pair)):
                (at, _, loss), (base_at, _, base) = pair
                validation.plot(at, loss - np.interp(at, base_at, base), **style)
            _, seconds, loss = _mean_curve(runs, "validation", study.seconds_per_token(v))
            timed.plot(seconds, loss, **style)
    training.set(xlabel="tokens", ylabel="training loss, smoothed, nats/token")
    validation.set(xlabel="tokens", ylabel="validation loss less reference's, nats/token")
    timed.set(xlabel="seconds of training", ylabel="validation loss, nats/token")
    for axes in (training, timed):
        _cut_first_descent(axes)
    _legend(figure)


def by_layer(figure: Figure, study: StudyResults, size: str, names: Mapping[str, str]) -> None:
    """Attention statistics over layers, mean over seeds, a panel for each name."""
    figure.set_size_inches(9, 6)
    for axes, (name, label) in zip(figure.subplots(2, 3).flat, names.items(), strict=True):
        for v in (v for v in study.variants if v.size == size):
            if points := study.by_layer(v, name):
                axes.plot(*zip(*points, strict=True), **_style(study, v), markersize=4)
        axes.set(title=label, xlabel="layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure)


def retrieval(figure: Figure, study: StudyResults, name: str, scale: float, chance: float) -> None:
    """The probe's measure by length and depth, mean over seeds: blue above chance, orange below."""
    maps = [(v, scale * x.mean(axis=0)) for v in study.variants if (x := study.probed(v, name)) is not None]
    about = next(run["probe"] for run in study.finished if run.get("probe"))
    reach = max(float(np.abs(values - chance).max()) for _, values in maps) or 1.0
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure.set_size_inches(2.3 * columns + 0.5, 2.1 * rows + 0.3)
    for axes, (v, values) in zip(figure.subplots(rows, columns, squeeze=False).flat, maps, strict=False):
        axes.pcolormesh(values, cmap="PuOr", vmin=chance - reach, vmax=chance + reach)
        axes.invert_yaxis()
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value - chance) > 0.6 * reach else "black"
            axes.text(j + 0.5, i + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(np.arange(len(about["depths"])) + 0.5, [f"{100 * d:g}%" for d in about["depths"]])
        axes.set_yticks(np.arange(len(about["lengths"])) + 0.5, [f"{n:,}" for n in about["lengths"]])
        axes.set_title(study.title(v).replace(", ", ",\n", 1), parse_math=False)
        axes.grid(visible=False)
    for axes in figure.axes[len(maps) :]:
        axes.remove()


def by_gain(figure: Figure, study: StudyResults) -> None:
    """Every run's loss over the retrieval probe's gain by context, a panel for each size."""
    sizes = [size for size in study.sizes if any(run["size"] == size for run in study.finished)]
    figure.set_size_inches(max(8, 1 + 4 * len(sizes)), 4.5)
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for v in study.of_size(size):
            gains, losses = study.values(v, "probe", "overall", "gain"), study.values(v, "validation_loss")
            points = [(gain, losses[seed]) for seed, gain in gains.items() if seed in losses]
            if points:
                axes.plot(*zip(*points, strict=True), **_style(study, v) | {"linestyle": ""})
        axes.set(xlabel="gain by context, nats", ylabel="validation loss, nats/token", title=size)
    _legend(figure)


def _legend(figure: Figure) -> None:
    """Below the panels, every series of any of them once; not the points of single seeds."""
    drawn = chain.from_iterable(zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes)
    named = {label: handle for handle, label in drawn if not label.endswith(", seeds")}
    columns = int(figure.get_figwidth() / 2.6)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def _style(study: StudyResults, variant: Variant) -> dict[str, Any]:
    """A variant's label, and the colour and marker of its attention, alike in all plots; outlined
    unless PolyNorm.
    """
    kind = list(dict.fromkeys(v.label for v in study.variants)).index(variant.label)
    plain = variant.activation != ACTIVATIONS["poly_norm"]
    # Ten colours and nine markers: no two of ninety look the same.
    look = {"label": study.title_in_size(variant), "color": f"C{kind % 10}", "marker": "osD^pv*Xh"[kind % 9]}
    return look | ({"markerfacecolor": "white", "linestyle": "--"} if plain else {})


def _mean_curve(
    runs: Sequence[Mapping[str, Any]], field: str, seconds_per_token: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean over runs at the first one's tokens: tokens, seconds and loss. Seconds are the runs'
    own unless a token's are given.
    """
    found = [[row[:3] for row in run.get(field) or () if row[2] is not None] for run in runs]
    tables = [np.array(rows, dtype=float).T for rows in found if rows]
    if not tables:
        return np.empty(0), np.empty(0), np.empty(0)
    at = tables[0][0]
    _, seconds, loss = np.mean([[np.interp(at, table[0], column) for column in table] for table in tables], axis=0)
    return at, seconds if seconds_per_token is None else at * seconds_per_token, loss


def _cut_first_descent(axes: Axes) -> None:
    """The first descent is alike for all, and would flatten the rest."""
    curves = [np.array(line.get_data(), dtype=float) for line in axes.get_lines()]
    if tops := [float(np.interp(0.2 * x[-1], x, y)) for x, y in curves if x.size]:
        axes.set_ylim(top=max(tops))
