"""The report's curves: losses over tokens and over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from motifarch.study import charts
from motifarch.study.document import Block, Picture, Section, Text, number
from motifarch.study.findings import Run, Study, Variant
from motifarch.study.report_losses import LOSS, hollow, kind
from motifarch.train.plots import smooth


def curves(study: Study) -> Section:
    """Losses over tokens and over time."""
    note = Text("Each line is the mean over a variant's finished seeds.", note=True)
    panels = study.panels()
    if len(panels) == 1:
        return Section("Loss curves", [note, *_curves_of(study, *panels[0])])
    sections = [Section(f"Curves: {title}", _curves_of(study, title, group)) for title, group in panels]
    return Section("Loss curves", [note], sections)


def _curves_of(study: Study, title: str, group: Sequence[Variant]) -> list[Block]:
    reference = study.reference(group)
    training, validation, timed = [], [], []
    for v in group:
        runs = study.runs_of(v)
        look = (study.label_in(group, v), kind(study, v))
        train = _mean_curve(runs, "curve", 0, 2)
        level = smooth([y for _, y in train], 1 - 1 / min(50, 1 + len(train) / 25))
        training.append(charts.Series(*look, [(x, y) for (x, _), y in zip(train, level, strict=True)], hollow(v)))
        validation.append(charts.Series(*look, _difference(study, v, reference), hollow(v)))
        timed.append(charts.Series(*look, _mean_curve(runs, "validation", 1, 2), hollow(v)))
    found: list[Block] = []
    for name, series, x, y, options in (
        ("Training loss, smoothed", training, "tokens", "training loss, nats a token", {"top": _top(training)}),
        (
            f"Validation loss less that of {reference.label}",
            validation,
            "tokens",
            "difference, nats a token",
            {"zero": True},
        ),
        ("Validation loss against time", timed, "seconds of training", LOSS, {"top": _top(timed)}),
    ):
        if any(s.points for s in series):
            told = "; ".join(f"{s.label} {number(s.points[-1][1], 4)}" for s in series if s.points)
            description = f"{name}, over {x}, {title}; at the end: {told}."
            drawn = charts.lines(f"{name}, {title}", description, series, x, y, **options)  # type: ignore[arg-type]
            found.append(Picture(name, description, _how_to_read(name), drawn))
    return found or [Text("No run of this group finished.")]


def _difference(study: Study, variant: Variant, reference: Variant) -> list[tuple[float, float]]:
    """Variant minus reference over tokens, on the seeds that both finished: others would add what
    seeds do.
    """
    own, plain = ({run["seed"]: run for run in study.runs_of(v)} for v in (variant, reference))
    shared = [seed for seed in own if seed in plain]
    curve, baseline = (_mean_curve([runs[seed] for seed in shared], "validation", 0, 2) for runs in (own, plain))
    if not curve or not baseline:
        return []
    at = np.interp([x for x, _ in curve], [x for x, _ in baseline], [y for _, y in baseline])
    return [(x, y - float(b)) for (x, y), b in zip(curve, at, strict=True)]


def _how_to_read(name: str) -> str:
    notes = {
        "Training loss, smoothed": "The first descent is cut off.",
        "Validation loss against time": "Seconds of the machine that ran it, whatever else it did meanwhile.",
    }
    return notes.get(name, "Below zero is better than the reference.")


def _after(points: Sequence[tuple[float, float]], share: float) -> float:
    """The value once that share of the way has passed."""
    last = points[-1][0]
    return next((y for x, y in points if x >= share * last), points[-1][1])


def _top(series: Sequence[charts.Series]) -> float | None:
    """Where to cut a chart off: the first descent is alike for all, and would flatten the rest."""
    return max((_after(s.points, 0.2) for s in series if s.points), default=None)


def _mean_curve(runs: Sequence[Run], field: str, x: int, y: int) -> list[tuple[float, float]]:
    """The mean over runs, at the first run's tokens (or seconds, on average)."""
    found = [[row for row in run.get(field) or () if row[y] is not None] for run in runs]
    found = [rows for rows in found if rows]
    if not found:
        return []
    at = np.array([row[0] for row in found[0]], dtype=float)
    columns = [
        np.mean([np.interp(at, [r[0] for r in rows], [r[c] for r in rows]) for rows in found], axis=0) for c in (0, 1)
    ]
    values = np.mean([np.interp(at, [r[0] for r in rows], [r[y] for r in rows]) for rows in found], axis=0)
    return [(float(a), float(b)) for a, b in zip(columns[x], values, strict=True)]
