"""The plot of a run: its losses, and its learning rate below."""

from pathlib import Path
from typing import Any

from motifarch.files import atomic_write

LOSS_PLOT = "loss.png"


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
    top.set_title(title)
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


def smooth(values: list[float], factor: float = 0.95) -> list[float]:
    """The exponential moving average, corrected for its start."""
    mean, weight, smoothed = 0.0, 0.0, []
    for value in values:
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + (1 - factor)
        smoothed.append(mean / weight)
    return smoothed
