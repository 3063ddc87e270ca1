"""The report's retrieval probe: means over all questions, and maps by length and depth of what
shows anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from motifarch.study import charts
from motifarch.study.document import Block, Picture, Pictures, Section, Table, Text, decimals, named, number, sentence
from motifarch.study.findings import ALPHA, Study, Variant
from motifarch.study.report_losses import written
from motifarch.study.statistics import CONFIDENCE, estimate


@dataclass(frozen=True)
class _Measure:
    """What the probe measures."""

    name: str
    label: str
    unit: str
    what: str
    scale: float = 1.0
    figures: int = 3
    """Significant ones of the largest value in a map."""


# What shows first comes first: models read a value out of the context long before they answer
# right.
_MEASURES = (
    _Measure("gain", "Gain", "nats", "nats that the context adds to the right value"),
    _Measure("binding", "Binding", "nats", "nats that the right name adds to its value"),
    _Measure("accuracy", "Accuracy", "%", "per cent of questions answered right", 100.0, 2),
)


def probe(study: Study) -> Section:
    """Means of the retrieval probe, and heat maps of what is above chance."""
    told = [run["probe"] for run in study.finished if run.get("probe")]
    if not told:
        return Section("Retrieval probe", [Text("No finished run has a retrieval probe.")])
    about = told[0]
    measures = [m for m in _MEASURES if m.name in about]
    intro = (
        f"{about['task']}; {about['samples']} samples for each length. Chance is {about['chance']:.0%} for accuracy, "
        f"and 0 for the others: {'; '.join(f'{m.label.lower()} is {m.what}' for m in measures if m.scale == 1)}."
    )
    blocks: list[Block] = [Text(sentence(intro)), _table(study, measures), *_at_chance(study, measures, about)]
    for measure in _drawn(study, measures, about):
        blocks.append(_maps(study, measure, about))
    return Section("Retrieval probe", blocks)


def _values(study: Study, variant: Variant, measure: _Measure) -> np.ndarray | None:
    """(seeds, lengths, depths)."""
    probes = [run["probe"] for run in study.runs_of(variant) if run.get("probe")]
    found = [p[measure.name] for p in probes if measure.name in p]
    return measure.scale * np.array(found, dtype=float) if found else None


def _chance(measure: _Measure, about: Mapping[str, Any]) -> float:
    return measure.scale * about["chance"] if measure.name == "accuracy" else 0.0


def _table(study: Study, measures: Sequence[_Measure]) -> Table:
    columns = []
    for m in measures:
        found = [_values(study, v, m) for v in study.variants]
        means = [None if x is None else estimate(list(x.mean(axis=(1, 2)))) for x in found]
        digits = decimals(e.mean for e in means if e)
        columns.append([written(e, digits) for e in means])
    rows = [(study.title(v), *(column[i] for column in columns)) for i, v in enumerate(study.variants)]
    caption = f"Retrieval over all lengths and depths, mean over seeds ± half of the {CONFIDENCE:.0%} interval"
    return Table(caption, ("Variant", *(f"{m.label}, {m.unit}" for m in measures)), rows)


def _above_chance(study: Study, measure: _Measure, about: Mapping[str, Any]) -> list[Variant] | None:
    """Variants that are clearly above it; None where results do not say how far questions alone
    lead astray.

    All runs are asked the same, so that a mean over seeds errs as much as one of them.
    """
    found = []
    for v in study.variants:
        told = [run["probe"].get("overall") or {} for run in study.runs_of(v) if run.get("probe")]
        if told and all(f"{measure.name}_error" in overall for overall in told):
            mean, error = (float(np.mean([o[key] for o in told])) for key in (measure.name, f"{measure.name}_error"))
            found.append((v, measure.scale * mean, measure.scale * error))
    if not found:
        return None
    beyond = float(stats.norm.ppf(1 - ALPHA / len(found)))
    return [v for v, mean, error in found if mean > _chance(measure, about) + beyond * error]


def _drawn(study: Study, measures: Sequence[_Measure], about: Mapping[str, Any]) -> list[_Measure]:
    """Gain whatever it is; accuracy only where it is above chance, and binding where accuracy is
    not.
    """
    clear = {m.name for m in measures if _above_chance(study, m, about) != []}
    second = "accuracy" if "accuracy" in clear else "binding" if "binding" in clear else None
    return [m for m in measures if m.name in ("gain", second)]


def _at_chance(study: Study, measures: Sequence[_Measure], about: Mapping[str, Any]) -> list[Block]:
    names = [m.label.lower() for m in measures if _above_chance(study, m, about) == []]
    if not names:
        return []
    are = "is" if len(names) == 1 else "are"
    return [
        Text(
            f"{sentence(named(names))} {are} at chance: no variant is above it by more than the choice of questions "
            f"explains ({ALPHA:.0%} level, corrected for the number of variants)."
        )
    ]


def _maps(study: Study, measure: _Measure, about: Mapping[str, Any]) -> Pictures:
    found = [(v, x.mean(axis=0)) for v in study.variants if (x := _values(study, v, measure)) is not None]
    chance = _chance(measure, about)
    # Of accuracy, all questions right is the deepest: a little above chance is to look like a
    # little.
    farthest = max(float(np.nanmax(np.abs(x - chance))) for _, x in found)
    reach = measure.scale - chance if measure.name == "accuracy" else farthest
    digits = decimals((float(v) for _, x in found for v in x.flat), measure.figures)

    def write(value: float) -> str:
        return number(value, digits)

    letters = max(len(write(float(value))) for _, x in found for value in x.flat)
    pictures = [_map(study, v, x, measure, about, (chance, reach, letters), write) for v, x in found]
    middle = "chance" if chance else "0"
    how = f"Blue: above {middle}; orange: below; deepest: {write(reach)} away from it."
    return Pictures(pictures, f"{measure.label} by length and depth, mean over seeds: {measure.what}. {how}")


def _map(
    study: Study,
    variant: Variant,
    mean: np.ndarray,
    measure: _Measure,
    about: Mapping[str, Any],
    look: tuple[float, float, int],
    write: Callable[[float], str],
) -> Picture:
    """One variant's, with the middle, reach and cells' letters of all."""
    middle, reach, letters = look
    lengths, depths = [f"{n:,}" for n in about["lengths"]], [f"{100 * d:g}%" for d in about["depths"]]
    told = "; ".join(
        f"{length} tokens: {', '.join(write(float(x)) for x in row)}" for length, row in zip(lengths, mean, strict=True)
    )
    title = study.title(variant)
    description = f"{measure.label} of {title}, {measure.what}, at depths {named(depths)}. {told}."
    svg = charts.heat_map(
        f"{measure.label}: {title}",
        description,
        mean.tolist(),
        lengths,
        depths,
        middle=middle,
        reach=reach,
        write=write,
        letters=letters,
    )
    return Picture(title, description, svg=svg)
