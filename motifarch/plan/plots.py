"""The plot of a plan: a GPU's memory at the peak of a step, against its capacity, and the time."""

from pathlib import Path
from typing import Any

from motifarch.files import atomic_write
from motifarch.plan import memory
from motifarch.plan.planning import Plan
from motifarch.plan.timing import PARTS

_COLOURS = {
    memory.PARAMETERS: "#1f4e79",
    memory.EXPERTS[memory.PARAMETERS]: "#3a2a5e",
    memory.OPTIMIZER: "#4f81b0",
    memory.EXPERTS[memory.OPTIMIZER]: "#6f5aa0",
    memory.GRADIENTS: "#9bb8d3",
    memory.EXPERTS[memory.GRADIENTS]: "#b0a3d0",
    memory.GATHERED: "#2f8f7f",
    memory.ACTIVATIONS: "#e0a030",
    memory.LOSS: "#c0392b",
    memory.WORKING: "#999999",
}


_TIME_COLOURS = ("#1f4e79", "#6f5aa0", "#2f8f7f", "#e0a030", "#4f81b0", "#c0392b", "#999999")


def draw_plans(plans: list[tuple[str, Plan]], path: Path, title: str) -> None:
    """Draws stacked bars of each plan's memory and time, into a PNG file.

    The named plans are on one kind of GPU: a recipe's own and what would fit in its place, or
    stages.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2 + 1.35 * len(plans)), layout="constrained")
    above, below = figure.subplots(2, height_ratios=[1.15, 1])
    figure.suptitle(title, parse_math=False)
    _draw_memory(above, plans)
    _draw_time(below, plans)
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=150, format="png")


def _draw_memory(axis: Any, plans: list[tuple[str, Plan]]) -> None:
    gib = 2.0**30
    first = plans[0][1]
    for row, (_, plan) in enumerate(plans):
        left = 0.0
        for kind, size in plan.by_kind(plan.trace.peak).items():
            width = size / gib
            axis.barh(row, width, left=left, height=0.55, color=_COLOURS[kind], label=kind if row == 0 else None)
            if width > 0.03 * first.gpu.memory / gib:
                axis.text(left + width / 2, row, f"{width:.1f}", ha="center", va="center", color="white", fontsize=9)
            left += width
        backing = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axis.text(1.012 * left, row, f"{left:.1f} GiB", va="center", fontweight="bold", bbox=backing)
    capacity, usable = first.gpu.memory / gib, first.usable / gib
    axis.axvspan(usable, capacity, color="#dddddd", zorder=0, label="kept in reserve")
    axis.axvline(capacity, color="black", linewidth=1.5, label=f"{first.gpu.name}: {capacity:.1f} GiB")
    axis.set_yticks(range(len(plans)), [name for name, _ in plans], parse_math=False)
    axis.set_ylim(len(plans) - 0.4, -0.6)
    axis.set_xlim(0, 1.13 * max(capacity, *(plan.peak / gib for _, plan in plans)))
    axis.set_xlabel("GiB of a GPU's memory at the peak of a step")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.28), ncols=3, frameon=False, fontsize=8)


def _draw_time(axis: Any, plans: list[tuple[str, Plan]]) -> None:
    for row, (_, plan) in enumerate(plans):
        left = 0.0
        for (part, label), colour in zip(PARTS.items(), _TIME_COLOURS, strict=True):
            seconds = getattr(plan.time, part)
            axis.barh(row, seconds, left=left, height=0.55, color=colour, label=label if row == 0 else None)
            left += seconds
        axis.text(left, row, f"  {left:.1f} s", va="center", fontweight="bold")
    axis.set_yticks(range(len(plans)), [name for name, _ in plans], parse_math=False)
    axis.set_ylim(len(plans) - 0.4, -0.6)
    axis.set_xlim(0, 1.13 * max(plan.time.total for _, plan in plans))
    axis.set_xlabel("seconds of a step, estimated")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.45, -0.3), ncols=2, frameon=False, fontsize=8)
