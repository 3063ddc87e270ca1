"""The report's beginning: what a study says in plain words."""

from __future__ import annotations

from collections.abc import Sequence

from motifarch.study.document import Items, Section, Text, named, plural, sentence
from motifarch.study.findings import ALPHA, Comparison, Study, Variant
from motifarch.study.report_answer import answer, facts
from motifarch.study.report_losses import written
from motifarch.study.statistics import CONFIDENCE, Estimate


def summary(study: Study) -> Section:
    """What the study says; the answer of its main group stands above, as the report's lead."""
    said = []
    for size, activation, group in study.groups():
        if len(group) > 1:
            said += _about_group(study, study.group_title(size, activation), group)
    said += _about_activation(study)
    return Section("In short", [Text(facts(study)), Items(said or ["There are no two variants to compare."])])


def _about_group(study: Study, title: str, group: Sequence[Variant]) -> list[str]:
    best, reference = study.best(group), study.reference(group)
    if best is None:
        return [f"{title}: no run finished."]
    where = f"{title}: " if len([g for _, _, g in study.groups() if len(g) > 1]) > 1 else ""
    loss, start = study.loss(best), study.loss(reference)
    assert loss is not None
    first = f"{where}the lowest mean validation loss is {best.label}'s, {written(loss)} nats a token ({_n(loss)})"
    if start is not None and best is not reference:
        share = 100 * (start.mean - loss.mean) / start.mean
        first += f", {share:.2f}% below {reference.label}'s, {written(start)}"
    found = [c for c in study.comparisons if c.reference is reference and c.variant in group]
    # The main group's answer is the report's lead.
    leads = group == study.main_group or len(study.ratios(group)) < 2
    said = [sentence(f"{first}.") if leads else answer(study, group)[0]]
    if all(c.p_holm is None for c in found):
        untested = f"{where}with fewer than two seeds that finished for both, no difference could be tested"
        return [*said, sentence(f"{untested}.")]
    better = [c.variant.label for c in found if c.significant and c.mean < 0]
    worse = [c.variant.label for c in found if c.significant and c.mean > 0]
    verdict = [_verb(better, "lower"), _verb(worse, "higher")]
    second = (
        f"{where}beyond what seeds explain, {' and '.join(filter(None, verdict))} loss than {reference.label}"
        if better or worse
        else f"{where}no difference from {reference.label} is beyond what seeds explain"
    )
    return [*said, sentence(f"{second} (paired t test, Holm, {ALPHA:.0%} level)."), *_shared(where, found)]


def _verb(labels: Sequence[str], what: str) -> str:
    return f"{named(labels)} {'has' if len(labels) == 1 else 'have'} a {what}" if labels else ""


def _shared(where: str, found: Sequence[Comparison]) -> list[str]:
    """What the noise of all variants together adds, where it adds anything."""
    more = [c for c in found if c.significant_if_equally_noisy and not c.significant]
    if not more:
        return []
    names = [f"{c.variant.label} ({'better' if c.mean < 0 else 'worse'})" for c in more]
    return [sentence(f"{where}if all variants are equally noisy, these differ too: {named(names)}.")]


def _about_activation(study: Study) -> list[str]:
    found = [c for c in study.comparisons if c.variant.label == c.reference.label and c.paired]
    if not found:
        return []
    lower = sum(c.mean < 0 for c in found)
    clear = sum(c.significant for c in found)
    if len(found) == 1:
        how = "lower" if lower else "higher"
        sure = f"{'' if clear else 'not '}beyond what seeds explain"
        sure = "not tested: one seed in common" if found[0].p_holm is None else sure
        return [f"Under {found[0].variant.label}, PolyNorm's mean loss is {how} than SwiGLU's ({sure})."]
    return [
        f"PolyNorm has a lower mean loss than SwiGLU under {lower} of {plural(len(found), 'attention')}; "
        f"{clear or 'none'} of these differences {'is' if clear == 1 else 'are'} beyond what seeds explain."
    ]


def _n(estimate: Estimate) -> str:
    if estimate.n < 2:
        return "one seed: no interval"
    return f"{estimate.n} seeds, {CONFIDENCE:.0%} interval"
