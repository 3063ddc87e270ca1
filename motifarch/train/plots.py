"""The plots of a run: its losses and learning rate; its experts' loads."""

import math
from pathlib import Path
from typing import Any

from motifarch.files import atomic_write

LOSS_PLOT = "loss.png"
ROUTER_PLOT = "router.png"


def draw_loss(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws training loss (faint, and smoothed), validation loss and learning rate over the steps.

    The rows are those of `metrics.jsonl`; the file is a PNG.
    """
    from matplotlib.figure import Figure

    trained = [row for row in rows if row.get("loss") is not None]
    validated = [row for row in rows if row.get("validation_loss") is not None]
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps = [row["step"] for row in trained]
    losses = [row["loss"] for row in trained]
    smoothed = smooth(losses, 1 - 1 / min(50, 1 + len(losses) / 25))
    top.plot(steps, losses, color="#9bb8d3", linewidth=0.8, label="training loss of a step")
    top.plot(steps, smoothed, color="#1f4e79", linewidth=1.8, label="training loss, smoothed")
    if validated:
        points = [row["step"] for row in validated], [row["validation_loss"] for row in validated]
        top.plot(*points, color="#c0392b", marker="o", markersize=4, linewidth=1, label="validation loss")
    top.set_ylabel("cross-entropy (nats/token)")
    top.set_title(title, parse_math=False)
    top.legend(frameon=False)
    rates = [(row["step"], row["learning_rate"]) for row in rows if row.get("learning_rate") is not None]
    bottom.plot([step for step, _ in rates], [rate for _, rate in rates], color="#555555", linewidth=1.2)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("step")
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")


_ROUTER_PANELS = (
    ("router_load_max_mean", "largest load / mean"),
    ("router_load_min_median", "smallest load / median"),
    ("router_entropy", "entropy of scores (nats)"),
    ("router_bias_range", "range of biases"),
)
_MOST_LINES = 8


def draw_router(rows: list[dict[str, Any]], path: Path, title: str) -> bool:
    """Draws how the experts of each layer are loaded over the steps: a line a layer.

    Of many layers eight have lines, and a band spans all. The rows are those of `metrics.jsonl`;
    the file is a PNG.

    Returns:
        Whether there was something to draw: rows of a model with experts.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get(_ROUTER_PANELS[0][0])]
    if not rows:
        return False
    steps = [row["step"] for row in rows]
    layers = [i for i, value in enumerate(rows[-1][_ROUTER_PANELS[0][0]]) if value is not None]
    most = min(len(layers), _MOST_LINES)
    drawn = [layers[i * (len(layers) - 1) // max(most - 1, 1)] for i in range(most)]
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (field, label) in zip(axes.flat, _ROUTER_PANELS, strict=True):
        curves = {i: [row[field][i] if row.get(field) else None for row in rows] for i in layers}
        curves = {i: [math.nan if value is None else value for value in curve] for i, curve in curves.items()}
        if len(layers) > len(drawn):
            spans = [sorted(values) for values in zip(*curves.values(), strict=True)]
            axis.fill_between(steps, *zip(*((s[0], s[-1]) for s in spans), strict=True), color="#cccccc", linewidth=0)
        for n, i in enumerate(drawn):
            color = colormaps["viridis"](0.9 * n / max(len(drawn) - 1, 1))
            axis.plot(steps, curves[i], color=color, linewidth=1.3, label=f"layer {i}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylim(bottom=1)
    axes[0, 1].set_ylim(0, 1)
    axes[1, 1].set_ylim(bottom=0)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title, parse_math=False)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=most, frameon=False)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")
    return True


def smooth(values: list[float], factor: float = 0.95) -> list[float]:
    """The exponential moving average, corrected for its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        smoothed.append(mean / weight)
    return smoothed
