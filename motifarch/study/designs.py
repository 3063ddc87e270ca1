"""What a study's designs say of the head ratio: how loss changes with it in each, and, of all
together, with signal and with noise heads.

A ratio does not vary alone. With noise heads fixed, a higher one has more signal heads; with signal
heads fixed, fewer noise heads; with query heads fixed, more of one and fewer of the other. Loss is
taken as a plane over the logarithms of both numbers, the seeds as blocks. Were the ratio all that
counts, its two slopes would be opposite. No single design has both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy import stats
from statsmodels.regression.linear_model import OLS, RegressionResults

from motifarch.study.analysis import ALPHA, Estimate, StudyResults, Variant, holm

Fixed = Literal["noise_heads", "signal_heads", "query_heads"]


@dataclass(frozen=True)
class Effects:
    """A straight line or plane through losses, and whether they lie on it."""

    slopes: tuple[Estimate, ...]
    """Nats for a doubling of each of what varies."""
    misfit_p: float | None
    """p value of the F test that means of variants lie on it; None where it has as many parameters
    as there are means.
    """


@dataclass(frozen=True)
class Design:
    """A design at one size, with what came out."""

    name: str
    fixed: Fixed
    size: str
    variants: list[Variant]
    """By rising ratio."""
    trend: Effects | None
    """For a doubling of the ratio; None where fewer than two ratios have losses."""
    seed_slopes: list[float]
    """The slope in each seed that has two ratios, by rising seed."""
    p_holm: float | None
    """The slope's p value, corrected for the number of the study's designs."""

    @property
    def slope(self) -> Estimate | None:
        """Nats for a doubling of the ratio."""
        return self.trend.slopes[0] if self.trend else None

    @property
    def verdict(self) -> Literal["falls", "rises", "unclear"]:
        """What the loss does as the ratio rises, beyond what seeds explain."""
        if self.slope is None or self.p_holm is None or self.p_holm > ALPHA:
            return "unclear"
        return "falls" if self.slope.mean < 0 else "rises"


@dataclass(frozen=True)
class Separation:
    """Signal and noise heads told apart, by all designs of a size: nats for a doubling."""

    size: str
    effects: Effects

    @property
    def signal(self) -> Estimate:
        """Of signal heads, with as many noise heads."""
        return self.effects.slopes[0]

    @property
    def noise(self) -> Estimate:
        """Of noise heads, with as many signal heads."""
        return self.effects.slopes[1]

    @property
    def both(self) -> Estimate:
        """Of both, so that the ratio stays: 0 if nothing but the ratio counts."""
        return self.effects.slopes[2]


class StudyDesigns:
    """The designs of a study's results; none of results that have none."""

    def __init__(self, study: StudyResults) -> None:
        self.study = study
        rows = study.results.get("designs") or []
        found = [(row, size, self._variants(row["variants"], size)) for row in rows for size in study.sizes]
        found = [(row, size, variants) for row, size, variants in found if len(variants) > 1]
        trends = [_effects(study, variants, [[_ratio(v)] for v in variants], [[1]]) for *_, variants in found]
        corrected = holm([trend.slopes[0].p if trend else None for trend in trends])
        self.all = [
            Design(row["name"], row["fixed"], size, variants, trend, _seed_slopes(study, variants), p)
            for (row, size, variants), trend, p in zip(found, trends, corrected, strict=True)
        ]

    def _variants(self, names: Sequence[str], size: str) -> list[Variant]:
        own = [v for v in self.study.variants if v.size == size and v.name in names]
        return sorted(own, key=lambda v: v.ratio or 0)

    def of_size(self, size: str) -> list[Design]:
        """Those of a size."""
        return [design for design in self.all if design.size == size]

    @property
    def variants(self) -> list[Variant]:
        """All that are of a design, each once."""
        return _distinct(v for design in self.all for v in design.variants)

    @cached_property
    def separations(self) -> list[Separation]:
        """Of the sizes whose designs tell ratio and heads apart."""
        found = []
        for size in self.study.sizes:
            variants = _distinct(v for design in self.of_size(size) for v in design.variants)
            places = [[math.log2(v.signal_heads or 1), math.log2(v.noise_heads or 1)] for v in variants]
            effects = _effects(self.study, variants, places, [[1, 0], [0, 1], [1, 1]])
            if effects:
                found.append(Separation(size, effects))
        return found

    def which(self, verdict: str) -> list[Design]:
        """Designs with a verdict."""
        return [design for design in self.all if design.verdict == verdict]


def _distinct(variants: Iterable[Variant]) -> list[Variant]:
    return list({(v.name, v.size): v for v in variants}.values())


def _ratio(variant: Variant) -> float:
    """Doublings of 1:1."""
    return math.log2(variant.ratio or 1)


def _seed_slopes(study: StudyResults, variants: Sequence[Variant]) -> list[float]:
    losses = [(study.values(v, "validation_loss"), _ratio(v)) for v in variants]
    by_seed = [[(at, own[seed]) for own, at in losses if seed in own] for seed in study.seeds]
    return [float(stats.linregress(*zip(*points, strict=True)).slope) for points in by_seed if len(points) > 1]


def _effects(
    study: StudyResults,
    variants: Sequence[Variant],
    places: Sequence[Sequence[float]],
    directions: Sequence[Sequence[float]],
) -> Effects | None:
    """Least squares of all runs' losses over places, each seed with a level of its own: the slopes
    along some directions.

    Returns:
        None where runs of two seeds do not determine it, or leave nothing over to judge it by.
    """
    cells = [
        (place, variant, seed, loss)
        for place, variant in zip(places, variants, strict=True)
        for seed, loss in study.values(variant, "validation_loss").items()
    ]
    if len({seed for *_, seed, _ in cells}) < 2:
        return None
    along = np.array([place for place, *_ in cells])
    blocks = _dummies([seed for *_, seed, _ in cells])
    losses = [loss for *_, loss in cells]
    design = np.hstack([along, blocks])
    if np.linalg.matrix_rank(design) < design.shape[1] or len(cells) <= design.shape[1]:
        return None
    fit = OLS(losses, design).fit()
    of_variants = np.hstack([_dummies([variant.name for _, variant, *_ in cells])[:, 1:], blocks])
    saturated = OLS(losses, of_variants).fit()
    between = saturated.df_model - fit.df_model
    misfit = saturated.compare_f_test(fit)[1] if between >= 1 and saturated.df_resid >= 1 else None
    others = [0.0] * blocks.shape[1]
    slopes = tuple(_slope(fit, [*direction, *others]) for direction in directions)
    return Effects(slopes, None if misfit is None or math.isnan(misfit) else float(misfit))


def _dummies(labels: Sequence[object]) -> np.ndarray:
    """A column of ones and zeros for each label."""
    distinct = list(dict.fromkeys(labels))
    return np.array([[float(label == other) for other in distinct] for label in labels])


def _slope(fit: RegressionResults, direction: Sequence[float]) -> Estimate:
    test = fit.t_test(np.array([direction]))
    ((low, high),) = test.conf_int(ALPHA)
    return Estimate(float(test.effect[0]), int(fit.nobs), None, float(high - low) / 2, float(test.pvalue))
