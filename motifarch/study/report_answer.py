"""The report's answer: which head ratio is best, by how much, how surely, and whether that is what
the paper says.
"""

from __future__ import annotations

from collections.abc import Sequence

from motifarch.study.document import named, plural, sentence
from motifarch.study.findings import Comparison, Study, Variant
from motifarch.study.report_limits import COSTS, millions
from motifarch.study.statistics import CONFIDENCE

CLAIMED_RATIO, CLAIMED_SHARE = 4, 0.025
"""Lim et al., "Grouped Differential Attention" (arXiv 2510.06949): about 2.5% over 1:1 at equal
cost, up to 4:1.
"""


def answer(study: Study, group: Sequence[Variant]) -> tuple[str, str]:
    """The answer for variants that differ in nothing but their attention.

    Returns:
        Which ratio is best, by how much and how surely; and how the other variants and the paper's
        claim stand to it.
    """
    ratios = [v for v in study.ratios(group) if study.loss(v)]
    best = study.best(ratios)
    if best is None:
        return "No run of a head ratio has finished: there is no answer yet.", ""
    if len(ratios) < 2:
        return f"Only one head ratio has finished runs, {_ratio(best)}: there is nothing to compare it with.", ""
    # Of those that ran on its seeds: against 1:1, which the paper improves on, or against the next
    # best.
    others = [c for v in ratios if v is not best and (c := study.compared(best, v)) and c.paired]
    eligible = study.eligible(ratios)
    rivals = [c for c in others if c.reference in eligible] or others
    first = next((c for c in rivals if c.reference.ratio == 1), max(rivals, key=lambda c: c.mean, default=None))
    rest = _rest(best, [c for c in others if c is not first]) if any(map(_told_apart, others)) else ""
    price = _price(study, best, first.reference) if first else ""
    more = [price, rest, _outside(study, best, group), claim(study, group)]
    several = len([g for _, _, g in study.groups() if len(study.ratios(g)) > 1]) > 1
    where = f"{study.group_title(best.size, best.activation)}: " if several else ""
    count = f"{len(eligible)} head ratios"
    if len(eligible) < len(ratios):
        count += " whose runs failed least"
    elif len(ratios) < len(study.ratios(group)):
        count += " that have finished runs"
    return f"{where}{_answer(study, best, count, first, others)}", " ".join(filter(None, more))


def _ratio(variant: Variant) -> str:
    """A head ratio by name: "GDA 4:1", "DIFF V1 (1:1)"."""
    ratio = f"{variant.ratio}:1"
    return variant.label if ratio in variant.label else f"{variant.label} ({ratio})"


def _answer(study: Study, best: Variant, count: str, first: Comparison | None, others: Sequence[Comparison]) -> str:
    loss = study.loss(best)
    assert loss is not None
    told = f"{_ratio(best)} has the lowest mean validation loss of {count}, {loss.mean:.4f} nats"
    if first is None:
        return f"{told}; no other ran on the same seeds."
    if all(c.significant and c.mean < 0 for c in others):
        told = f"{_ratio(best)} is the best of {count}: its mean validation loss is {loss.mean:.4f} nats"
    elif not any(map(_told_apart, others)):
        told = f"No head ratio is shown to be best. {told}"
    return f"{told}, {_size(study, first)} {_ratio(first.reference)}. {_verdict(first)}"


def _price(study: Study, best: Variant, reference: Variant) -> str:
    """What the best takes more or less of than the one it is compared with: equal in one cost is
    not in all.
    """
    by = study.results["matching"]["by"]
    shares = {what: best.row[key] / reference.row[key] - 1 for k, (key, what) in COSTS.items() if k != by}
    said = [
        f"{100 * abs(share):.1f}% {'more' if share > 0 else 'fewer'} {what}"
        for what, share in shares.items()
        if abs(share) >= study.results["matching"]["tolerance"]
    ]
    if not said:
        return ""
    return f"At equal {COSTS[by][1]}, {_ratio(best)} needs {named(said)} than {_ratio(reference)}."


def _told_apart(comparison: Comparison) -> bool:
    return comparison.significant or comparison.significant_if_equally_noisy


def _size(study: Study, comparison: Comparison) -> str:
    """By how much the variant is lower, as a rule."""
    assert comparison.paired is not None
    d, start = comparison.paired.difference, study.loss(comparison.reference)
    share = f" ({100 * abs(d.mean) / start.mean:.2f}%)" if start else ""
    half = f" ± {d.half:.4f}" if d.half is not None else ""
    return f"{abs(d.mean):.4f}{half}{share} {'above' if d.mean > 0 else 'below'}"


def _verdict(comparison: Comparison) -> str:
    """How surely two variants differ."""
    c = comparison
    if c.p_holm is None:
        more = f" ({_p(c.shared_p_holm)} if all variants are equally noisy)" if c.shared_p_holm is not None else ""
        return f"One seed in common allows no test of its own{more}."
    own = f"paired t test, {_p(c.p_holm)}"
    if c.significant:
        return f"Seeds do not explain it ({own} after Holm's correction)."
    if c.shared_p_holm is None:
        return f"Seeds alone may explain it ({own} after Holm's correction)."
    noisy = _p(c.shared_p_holm)
    if c.significant_if_equally_noisy:
        return (
            f"If all variants are equally noisy, seeds do not explain it ({noisy} after Holm's correction); by its own "
            f"pairs alone they may ({own})."
        )
    return f"Seeds alone may explain it ({own}; {noisy} if all variants are equally noisy; after Holm's correction)."


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def _rest(best: Variant, comparisons: Sequence[Comparison]) -> str:
    """The other ratios, by how surely they are worse."""
    worse = [c for c in comparisons if _told_apart(c) and c.mean < 0]
    groups = (
        ([c for c in worse if c.significant], "worse too"),
        ([c for c in worse if not c.significant], "worse too if all variants are equally noisy"),
        ([c for c in comparisons if not _told_apart(c)], f"not told apart from {_ratio(best)}"),
        ([c for c in comparisons if _told_apart(c) and c.mean > 0], "better on the seeds that both finished"),
    )
    said = [f"{_named(found)} {'is' if len(found) == 1 else 'are'} {how}" for found, how in groups if found]
    return f"{'; '.join(said)}." if said else ""


def _named(comparisons: Sequence[Comparison]) -> str:
    return named([_ratio(c.reference) for c in comparisons])


def _outside(study: Study, best: Variant, group: Sequence[Variant]) -> str:
    """Attention without a head ratio that does better still."""
    found = []
    for v in group:
        if v.ratio is None and (pair := study.paired(v, best)) and pair.difference.mean < 0:
            half = f" ± {pair.difference.half:.4f}" if pair.difference.half is not None else ""
            found.append(f"{v.label} (by {-pair.difference.mean:.4f}{half})")
    if not found:
        return ""
    are = "is" if len(found) == 1 else "are"
    said = f"{named(found)} {are} lower still, without a head ratio"
    return f"{sentence(said)} (paired {CONFIDENCE:.0%} intervals, not tested)."


def claim(study: Study, group: Sequence[Variant]) -> str:
    """How the paper's claim fares; nothing where the group lacks one of the two ratios."""
    by_ratio = {v.ratio: v for v in study.ratios(group)}
    if not {1, CLAIMED_RATIO} <= by_ratio.keys():
        return ""
    found = study.compared(by_ratio[CLAIMED_RATIO], by_ratio[1])
    start = study.loss(by_ratio[1])
    if found is None or found.paired is None or start is None:
        return ""
    share = -found.mean / start.mean
    reported = (
        f"The GDA paper (arXiv 2510.06949) reports about {100 * CLAIMED_SHARE:g}% for {CLAIMED_RATIO}:1 over 1:1, by "
        "its own measures"
    )
    here = f"here {CLAIMED_RATIO}:1's loss is {abs(100 * share):.2f}% {'lower' if share >= 0 else 'higher'}"
    if not _told_apart(found):
        return f"{reported}; {here}, which neither supports nor refutes it."
    given = "" if found.significant else ", if all variants are equally noisy"
    if share < 0:
        return f"{reported}; {here}{given}, which contradicts it at this size."
    judged = found.paired.difference if found.significant or found.shared is None else found.shared[0]
    if judged.lower is None or judged.upper is None:
        return ""
    least, most = -judged.upper / start.mean, -judged.lower / start.mean
    interval = f"{CONFIDENCE:.0%} interval {100 * least:.2f}% to {100 * most:.2f}%"
    return f"{reported}; {here} ({interval}{given}), in the same direction."


def facts(study: Study) -> str:
    """What was run."""
    labels = {a: [v.label for v in study.variants if v.activation == a] for a in study.activations}
    unique = {activation: list(dict.fromkeys(found)) for activation, found in labels.items()}
    every = list(unique.values())
    if all(found == every[0] for found in every):
        what = f"{named(every[0])} with {named(study.activations)}"
    else:
        what = "; ".join(f"{named(found)} with {activation}" for activation, found in unique.items())
    tokens = [run["tokens"] for run in study.finished if run.get("tokens")]
    trained = f", {millions(tokens)} tokens each" if tokens else ""
    parameters = millions(v.row["parameters"] for v in study.variants)
    seeds = f"{'seed' if len(study.seeds) == 1 else 'seeds'} {named(list(map(str, study.seeds)))}"
    runs = f"{len(study.finished)} of {plural(len(study.runs), 'run')} finished"
    equal = COSTS[study.results["matching"]["by"]][1]
    return sentence(f"{what}, equal in {equal}: {parameters} parameters{trained}, {seeds}; {runs}.")
