"""The report's main part: which variant has the lowest loss, by how much, and whether seeds alone could explain it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from motifarch.study import charts
from motifarch.study.document import Block, Picture, Section, Table, Text, named, plural, signed
from motifarch.study.findings import ACTIVATIONS, Comparison, Run, Study, Variant
from motifarch.study.statistics import CONFIDENCE, POWER, Estimate
from motifarch.train.picture import smooth

ALPHA = 1 - CONFIDENCE
# Colours and markers of the attentions that studies are about; others take what is left.
_KINDS = ("softmax MHA", "softmax GQA", "DIFF V1", "GDA 2:1", "GDA 3:1", "GDA 4:1", "GDA 7:1", "DIFF V2")
LOSS = "validation loss, nats a token"


def kind(study: Study, variant: Variant) -> int:
    """The colour and marker of a variant: its attention's."""
    if variant.label in _KINDS:
        return _KINDS.index(variant.label)
    labels = list(dict.fromkeys(v.label for v in study.variants))
    free = [i for i, name in enumerate(_KINDS) if name not in labels] or list(range(len(_KINDS)))
    return free[[label for label in labels if label not in _KINDS].index(variant.label) % len(free)]


def hollow(variant: Variant) -> bool:
    """Whether it is drawn as an outline: all but PolyNorm."""
    return variant.activation != ACTIVATIONS["poly_norm"]


def written(estimate: Estimate | None, digits: int = 4) -> str:
    """A mean with half of its interval."""
    if estimate is None:
        return "–"
    half = estimate.half
    return f"{estimate.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def mean_difference(comparison: Comparison) -> float:
    """Variant minus reference; 0 where no pair finished."""
    return comparison.paired.difference.mean if comparison.paired else 0.0


def significant(comparison: Comparison) -> bool:
    """Whether it is beyond what seeds explain, after correction."""
    return comparison.p_holm is not None and comparison.p_holm <= ALPHA


def losses(study: Study) -> Section:
    """Head ratio against loss, and every variant's loss."""
    blocks: list[Block] = []
    for size in study.sizes:
        blocks.append(_ratio_picture(study, size))
        blocks.append(_loss_table(study, size))
    note = (
        f"Mean over seeds ± half of the {CONFIDENCE:.0%} interval (Student's t); a variant with one finished seed has "
        "no interval. Bold: lowest mean of its group, among those with most finished seeds. Intervals of single "
        "variants hold what seeds do to all of them alike; for differences, see below."
    )
    return Section("Head ratio against loss", [*blocks, Text(note, note=True)])


def _ratio_picture(study: Study, size: str) -> Picture:
    columns: dict[str, list[charts.Dot]] = {}
    told = []
    for v in study.variants:
        loss = study.loss(v)
        if v.size != size or loss is None:
            continue
        seeds = sorted(study.values(v, "validation_loss").items())
        columns.setdefault(v.label, []).append(charts.Dot(v.title, kind(study, v), loss, seeds, hollow(v)))
        told.append(f"{study.title(v)} {written(loss)}")
    several = f", {size}" if len(study.sizes) > 1 else ""
    title = f"Validation loss by attention and head ratio{several}"
    both = "; filled marks: PolyNorm; outlined: SwiGLU" if len(study.activations) > 1 else ""
    description = f"{LOSS.capitalize()}: {'; '.join(told) or 'no finished runs'}."
    family = [v.label for v in study.variants if v.row["attention"] in ("diff_v1", "gda")]
    svg = charts.by_ratio(title, description, list(columns.items()), LOSS, joined=family)
    note = f"Whiskers: {CONFIDENCE:.0%} intervals; dots: single seeds; the line joins rising head ratios{both}."
    return Picture(title, description, note, svg)


def _loss_table(study: Study, size: str) -> Table:
    rows: list[Sequence[str]] = []
    strong = []
    for _, _, group in [g for g in study.groups() if g[0] == size]:
        best, reference = study.best(group), study.reference(group)
        start = study.loss(reference)
        for v in group:
            loss = study.loss(v)
            marks = [name for name, other in (("lowest", best), ("reference", reference)) if v is other]
            relative = f"{100 * (loss.mean / start.mean - 1):+.2f}%".replace("-", "−") if loss and start else "–"
            seeds = " ".join(f"{x:.4f}" for _, x in sorted(study.values(v, "validation_loss").items()))
            if v is best:
                strong.append(len(rows))
            rows.append(
                (study.title(v), ", ".join(marks), written(loss), relative, str(loss.n if loss else 0), seeds or "–")
            )
    several = f", {size}" if len(study.sizes) > 1 else ""
    columns = ("Variant", "Mark", "Loss", "Against reference", "Seeds", "Each seed")
    return Table(f"Validation loss at the end, nats a token{several}", columns, rows, 2, frozenset(strong))


def differences(study: Study) -> Section:
    """Paired differences with their significance."""
    blocks: list[Block] = []
    for title, found in _families(study):
        shown = [c for c in found if c.paired]
        rows = [
            charts.Interval(
                _row_name(study, c),
                kind(study, c.variant),
                c.paired.difference,
                c.shared[0] if c.shared else None,
                hollow(c.variant),
            )
            for c in shown
            if c.paired
        ]
        told = "; ".join(f"{_row_name(study, c)} {_difference(c)}" for c in shown) or "no pairs of finished runs"
        note = "Thin: interval from the pair's own seeds; thick: from the noise of all variants together."
        drawn = charts.intervals(title, told, rows, "difference in validation loss, nats a token")
        blocks.append(Picture(title, f"{title}: {told}.", note, drawn))
        blocks.append(_difference_table(study, title, found))
    if not blocks:
        return Section("Paired differences", [Text("There are no two variants to compare.")])
    count = len([c for c in study.comparisons if c.paired])
    noise = [f"{n.sd:.4f} ({n.freedom} degrees of freedom)" for n in study.noise.values() if n]
    notes = [
        "Variant minus reference on the same seeds, where both finished: such pairs share first weights' scale and "
        f"data order. Below zero is better. p is of the two-sided paired t test; Holm's correction is over all "
        f"{plural(count, 'comparison')} on this page, so that the chance of any false alarm among them is at most "
        f"{ALPHA:.0%}. Bold: significant after it. Fewer than two pairs give no interval and no test.",
        "Detectable: the smallest true difference that the pair's own test would find with "
        f"{POWER:.0%} chance, uncorrected.",
    ]
    if noise:
        notes.append(
            f"Shared noise: all variants are taken to be equally noisy, and one run's standard deviation, "
            f"{named(noise)}, is estimated from all of them once variants and seeds are accounted for (a "
            "randomised block design). It sees more, and is right only as far as that holds."
        )
    notes.append("The lowest mean was found by looking, so it has no test of its own against the rest.")
    return Section("Paired differences", [*blocks, *(Text(note, note=True) for note in notes)])


def _families(study: Study) -> list[tuple[str, list[Comparison]]]:
    found = []
    for size, activation, group in study.groups():
        reference = study.reference(group)
        chosen = [c for c in study.comparisons if c.reference is reference and c.variant in group]
        if chosen:
            where = f", {study.group_title(size, activation)}" if len(list(study.groups())) > 1 else ""
            found.append((f"Difference from {reference.label}{where}", chosen))
    activations = [c for c in study.comparisons if c.variant.label == c.reference.label]
    if activations:
        found.append(("Difference of PolyNorm from SwiGLU under the same attention", activations))
    return found


def _row_name(study: Study, comparison: Comparison) -> str:
    v = comparison.variant
    if v.label == comparison.reference.label and len(study.sizes) > 1:
        return f"{v.label}, {v.size}"
    return v.label


def _difference(comparison: Comparison) -> str:
    assert comparison.paired is not None
    d = comparison.paired.difference
    half = f" ± {d.half:.4f}" if d.half is not None else ""
    return f"{signed(d.mean)}{half}"


def _difference_table(study: Study, title: str, found: Sequence[Comparison]) -> Table:
    rows, strong = [], []
    for i, c in enumerate(found):
        if c.paired is None:
            rows.append((_row_name(study, c), "no pair finished", *["–"] * 7))
            continue
        start = study.loss(c.reference)
        share = f"{100 * c.paired.difference.mean / start.mean:+.2f}%".replace("-", "−") if start else "–"
        shared = (f"± {c.shared[0].half:.4f}", _p(c.shared_p_holm)) if c.shared else ("–", "–")
        detectable = f"{c.paired.detectable:.4f}" if c.paired.detectable is not None else "–"
        cells = (_difference(c), share, str(len(c.paired.seeds)), _p(c.paired.p), _p(c.p_holm), detectable, *shared)
        rows.append((_row_name(study, c), *cells))
        if significant(c):
            strong.append(i)
    columns = ("Variant", "Difference", "Relative", "Pairs", "p", "p, Holm", "Detectable", "Shared noise", "p, Holm")
    return Table(title, columns, rows, 1, frozenset(strong))


def curves(study: Study) -> Section:
    """Losses over tokens and over time."""
    sections = []
    for size, activation, group in study.groups():
        blocks = _curves_of(study, study.group_title(size, activation), group)
        sections.append(Section(f"Curves: {study.group_title(size, activation)}", blocks))
    note = "Each line is the mean over a variant's finished seeds."
    if len(sections) == 1:
        return Section("Loss curves", [Text(note, note=True), *sections[0].blocks])
    return Section("Loss curves", [Text(note, note=True)], sections)


def _curves_of(study: Study, title: str, group: Sequence[Variant]) -> list[Block]:
    reference = study.reference(group)
    training, validation, timed = [], [], []
    baseline = _mean_curve(study.runs_of(reference), "validation", 0, 2)
    for v in group:
        runs = study.runs_of(v)
        look = (v.label, kind(study, v))
        train = _mean_curve(runs, "curve", 0, 2)
        level = smooth([y for _, y in train], 1 - 1 / min(50, 1 + len(train) / 25))
        training.append(charts.Series(*look, [(x, y) for (x, _), y in zip(train, level, strict=True)], hollow(v)))
        own = _mean_curve(runs, "validation", 0, 2)
        if baseline and own:
            at = np.interp([x for x, _ in own], [x for x, _ in baseline], [y for _, y in baseline])
            points = [(x, y - float(b)) for (x, y), b in zip(own, at, strict=True)]
            validation.append(charts.Series(*look, points, hollow(v)))
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
            told = "; ".join(f"{s.label} {s.points[-1][1]:.4f}".replace("-", "−") for s in series if s.points)
            description = f"{name}, over {x}, {title}; at the end: {told}."
            drawn = charts.lines(f"{name}, {title}", description, series, x, y, **options)  # type: ignore[arg-type]
            found.append(Picture(name, description, _how_to_read(name), drawn))
    return found or [Text("No run of this group finished.")]


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
