"""The report's beginning: what a study says in plain words, and what it cannot say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from motifarch.study.document import Items, Section, Text, named, plural
from motifarch.study.findings import Comparison, Study, Variant
from motifarch.study.report_losses import ALPHA, mean_difference, significant, written
from motifarch.study.statistics import CONFIDENCE, POWER, Estimate, detectable_difference


def summary(study: Study) -> Section:
    """What the study says and does not say, in plain words."""
    planned, done = len(study.runs), len(study.finished)
    tokens = sorted({run["tokens"] for run in study.finished if run.get("tokens")})
    parameters = [v.row["parameters"] for v in study.variants]
    said = []
    for size, activation, group in study.groups():
        said += _about_group(study, study.group_title(size, activation), group)
    said += _about_activation(study)
    limits = [
        f"Models have {_range(parameters, 1e6, ' million')} parameters and saw "
        f"{_range(tokens, 1e6, ' million tokens')}. What holds at this size and length need not hold at another.",
        f"{plural(len(study.seeds), 'seed')} ({', '.join(map(str, study.seeds))}). {_about_power(study)}",
        "One data set, and one schedule for all variants. A different learning rate or text could change the order.",
    ]
    if (fall := _still_falling(study)) is not None and fall > 0:
        limits.append(
            f"In the last quarter of training the validation loss still fell by {fall:.4f} nats on average: longer "
            "runs may end lower, and in another order."
        )
    if done < planned:
        limits.append(f"{planned - done} of {planned} runs did not finish; they are listed under Failed runs.")
    return Section(
        "In short",
        [
            Items(said or ["No run has finished: there is nothing to compare."]),
            Text("What this study cannot say:"),
            Items(limits),
        ],
    )


def _still_falling(study: Study) -> float | None:
    """By how much the validation loss fell in the last quarter of the tokens, mean over runs; None if it is unknown."""
    falls = []
    for run in study.finished:
        rows = [row for row in run.get("validation") or () if row[2] is not None]
        earlier = [loss for tokens, _, loss in rows if tokens <= 0.75 * run["tokens"]]
        if earlier:
            falls.append(earlier[-1] - run["validation_loss"])
    return float(np.mean(falls)) if falls else None


def _range(values: Sequence[float], unit: float, name: str) -> str:
    if not values:
        return f"no{name}"
    low, high = (f"{v / unit:.3g}" for v in (min(values), max(values)))
    return f"{low}{name}" if low == high else f"{low} to {high}{name}"


def _about_group(study: Study, title: str, group: Sequence[Variant]) -> list[str]:
    best, reference = study.best(group), study.reference(group)
    if best is None:
        return [f"{title}: no run finished."]
    where = f"{title}: " if len(list(study.groups())) > 1 else ""
    loss = study.loss(best)
    assert loss is not None
    first = f"{where}the lowest mean validation loss is {best.label}'s, {written(loss)} nats a token ({_n(loss)})"
    start = study.loss(reference)
    if start is not None and best is not reference:
        share = 100 * (start.mean - loss.mean) / start.mean
        first += f"; the reference {reference.label} has {written(start)}, {share:.2f}% more"
    found = [c for c in study.comparisons if c.reference is reference and c.variant in group]
    if all(c.p_holm is None for c in found):
        untested = f"{where}with fewer than two seeds that finished for both, no difference could be tested"
        return [_sentence(first), _sentence(untested)]
    better = [c.variant.label for c in found if significant(c) and mean_difference(c) < 0]
    worse = [c.variant.label for c in found if significant(c) and mean_difference(c) > 0]
    verdict = [_verb(better, "lower"), _verb(worse, "higher")]
    second = (
        f"{where}beyond what seeds explain, {' and '.join(filter(None, verdict))} loss than {reference.label}"
        if better or worse
        else f"{where}no difference from {reference.label} is beyond what seeds explain"
    )
    return [_sentence(first), _sentence(f"{second} (paired t test, Holm, {ALPHA:.0%} level)"), *_shared(where, found)]


def _verb(labels: Sequence[str], what: str) -> str:
    return f"{named(labels)} {'has' if len(labels) == 1 else 'have'} a {what}" if labels else ""


def _shared(where: str, found: Sequence[Comparison]) -> list[str]:
    """What the noise of all variants together adds, where it adds anything."""
    more = [c for c in found if c.shared_p_holm is not None and c.shared_p_holm <= ALPHA and not significant(c)]
    if not more:
        return []
    names = [f"{c.variant.label} ({'better' if mean_difference(c) < 0 else 'worse'})" for c in more]
    return [_sentence(f"{where}if all variants are equally noisy, these differ too: {named(names)}")]


def _about_activation(study: Study) -> list[str]:
    found = [c for c in study.comparisons if c.variant.label == c.reference.label and c.paired]
    if not found:
        return []
    lower = sum(mean_difference(c) < 0 for c in found)
    clear = sum(significant(c) for c in found)
    return [
        f"PolyNorm has a lower mean loss than SwiGLU under {lower} of {plural(len(found), 'attention')}; "
        f"{clear or 'none'} of these differences {'is' if clear == 1 else 'are'} beyond what seeds explain."
    ]


def _about_power(study: Study) -> str:
    """What so many seeds can show at all."""
    found = [c.paired for c in study.comparisons if c.paired and c.paired.difference.sd]
    if not found:
        return "With fewer than two finished seeds there are no intervals and no tests."
    sd = float(np.median([p.difference.sd for p in found if p.difference.sd is not None]))
    n = int(np.median([p.difference.n for p in found]))
    alone, corrected = (detectable_difference(sd, n, alpha=ALPHA / m) for m in (1, len(found)))
    text = (
        f"Differences between two variants vary by {sd:.4f} from seed to seed (median standard deviation); a paired "
        f"test of {n} seeds finds a true difference of {alone:.4f} nats with {POWER:.0%} chance"
    )
    if len(found) > 1:
        text += f", and after correction for {len(found)} comparisons one of {corrected:.4f}"
    return f"{text}. Smaller ones may exist and stay unseen."


def _n(estimate: Estimate) -> str:
    if estimate.n < 2:
        return "one seed: no interval"
    return f"{estimate.n} seeds, {CONFIDENCE:.0%} interval"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
