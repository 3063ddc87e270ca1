"""The report's main part: which variant has the lowest loss, by how much, and whether seeds alone
could explain it.
"""

from __future__ import annotations

from collections.abc import Sequence

from motifarch.study import charts
from motifarch.study.document import Block, Picture, Section, Table, Text, named, number, percent, plural, signed
from motifarch.study.findings import ACTIVATIONS, ALPHA, Comparison, Study, Variant
from motifarch.study.statistics import CONFIDENCE, POWER, Estimate

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
    return number(estimate.mean, digits) + (f" ± {number(half, digits)}" if half else "")


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def losses(study: Study) -> Section:
    """Head ratio against loss, and every variant's loss."""
    blocks: list[Block] = []
    for size in study.sizes:
        blocks.append(_ratio_picture(study, size))
        blocks.append(_loss_table(study, size))
    note = (
        f"Mean over seeds ± half of the {CONFIDENCE:.0%} interval (Student's t); one seed has none. Bold: lowest mean "
        "on the seeds that all finished, variants with failed runs left out. A seed moves all variants alike, and that "
        "is in these intervals: to compare variants, see the paired differences."
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
            relative = percent(loss.mean / start.mean - 1) if loss and start and v is not reference else "–"
            seeds = " ".join(f"{x:.4f}" for _, x in sorted(study.values(v, "validation_loss").items()))
            # A variant that has none to be compared with is neither.
            mark = " (reference)" if v is reference and len(group) > 1 else ""
            if v is best and len(group) > 1:
                strong.append(len(rows))
            rows.append((f"{study.title(v)}{mark}", written(loss), relative, str(loss.n if loss else 0), seeds or "–"))
    several = f", {size}" if len(study.sizes) > 1 else ""
    columns = ("Variant", "Loss", "Against reference", "Seeds", "Each seed")
    return Table(f"Validation loss at the end, nats a token{several}", columns, rows, strong=frozenset(strong))


def differences(study: Study) -> Section:
    """Paired differences with their significance."""
    blocks: list[Block] = []
    for title, found in _families(study):
        shown = [c for c in found if c.paired]
        blocks.append(_difference_picture(study, title, shown))
        blocks.append(_difference_table(study, title, found))
    if not blocks:
        return Section("Paired differences", [Text("There are no two variants to compare.")])
    count = len([c for c in study.comparisons if c.paired])
    noise = [f"{n.sd:.4f} ({n.freedom} degrees of freedom)" for n in study.noise.values() if n]
    notes = [
        f"Variant minus reference on the seeds that both finished, ± half of the {CONFIDENCE:.0%} interval; below zero "
        "is better. Pairs share data order and the scale of first weights. p: two-sided paired t test. p (Holm): "
        f"corrected over all {plural(count, 'comparison')} on this page, so that any false alarm among them has a "
        f"chance of at most {ALPHA:.0%}; intervals are not corrected. Bold: significant after it. Fewer than two pairs "
        "give no interval and no test.",
        f"Detectable: the smallest true difference that the pair's test finds with {POWER:.0%} chance, uncorrected.",
    ]
    if noise:
        notes.append(
            f"Shared noise: one run's standard deviation, {named(noise)}, from all variants once their means and the "
            "seeds' are taken out (a randomised block design). It sees more, and holds as far as variants are equally "
            "noisy."
        )
    return Section("Paired differences", [*blocks, *(Text(note, note=True) for note in notes)])


def _difference_picture(study: Study, title: str, shown: Sequence[Comparison]) -> Picture:
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
    return Picture(title, f"{title}: {told}.", note, drawn)


def _families(study: Study) -> list[tuple[str, list[Comparison]]]:
    found = []
    for size, activation, group in study.groups():
        reference = study.reference(group)
        chosen = [c for c in study.comparisons if c.reference is reference and c.variant in group]
        where = f", {study.group_title(size, activation)}" if len(study.panels()) > 1 else ""
        if chosen:
            found.append((f"Difference from {reference.label}{where}", chosen))
        ratios = study.ratios(group)
        between = [c for c in study.comparisons if c.variant in ratios and c.reference in ratios and c not in chosen]
        if between:
            found.append((f"Differences between head ratios{where}", between))
    activations = [c for c in study.comparisons if c.variant.label == c.reference.label]
    if activations:
        found.append(("Difference of PolyNorm from SwiGLU under the same attention", activations))
    return found


def _row_name(study: Study, comparison: Comparison) -> str:
    v, reference = comparison.variant, comparison.reference
    if v.ratio and reference.ratio and reference.ratio != 1:
        return f"{v.label} less {reference.ratio}:1"
    return f"{v.label}, {v.size}" if v.label == reference.label and len(study.sizes) > 1 else v.label


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
        share = percent(c.mean / start.mean) if start else "–"
        shared = (f"± {c.shared[0].half:.4f}", _p(c.shared_p_holm)) if c.shared else ("–", "–")
        detectable = f"{c.paired.detectable:.4f}" if c.paired.detectable is not None else "–"
        cells = (_difference(c), share, str(len(c.paired.seeds)), _p(c.paired.p), _p(c.p_holm), detectable, *shared)
        rows.append((_row_name(study, c), *cells))
        if c.significant:
            strong.append(i)
    tests = ("Pairs", "p", "p (Holm)", "Detectable", "Shared noise", "Shared p (Holm)")
    columns = ("Variant", "Difference", "Relative", *tests)
    return Table(title, columns, rows, 1, frozenset(strong))
