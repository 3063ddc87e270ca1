"""What a few seeds allow to say: intervals, paired differences, corrected significance, and what
could have been seen.

Seeds are drawn at random and their losses taken as normal, so intervals are Student's t. Variants
are compared pair by pair on the seeds that both finished: such runs share data order and initial
scale, and what a seed does to both cancels in their difference. Three seeds leave a single pair's
noise almost unknown; where all variants may be taken to be equally noisy, :func:`shared_noise`
estimates it from all of them (the residual of a randomised block design).

Sources: Student, "The probable error of a mean", Biometrika 6 (1908); Holm, "A simple sequentially
rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979); Fisher, "The Design
of Experiments" (1935), for blocks; Welch, "The generalization of Student's problem", Biometrika 34
(1947); Cohen, "Statistical Power Analysis for the Behavioral Sciences" (1988), for the power of the
paired t test, from the noncentral t distribution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import optimize, stats

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and what is known of its error."""

    mean: float
    n: int
    sd: float | None = None
    """Standard deviation between seeds; None for a single one."""
    lower: float | None = None
    """Lower end of the interval; None where there is none (fewer than two seeds)."""
    upper: float | None = None

    @property
    def half(self) -> float | None:
        """Half of the interval's width."""
        return None if self.lower is None or self.upper is None else (self.upper - self.lower) / 2

    def __neg__(self) -> Estimate:
        """Of the values with the other sign."""
        lower, upper = (None if end is None else -end for end in (self.upper, self.lower))
        return replace(self, mean=-self.mean, lower=lower, upper=upper)


@dataclass(frozen=True)
class Paired:
    """How a variant differs from a reference over the seeds that both finished."""

    difference: Estimate
    """Of variant minus reference."""
    seeds: tuple[int, ...]
    p: float | None
    """Of the two-sided paired t test; None for fewer than two pairs."""
    detectable: float | None
    """The smallest true difference that this test would show; see :func:`detectable_difference`."""


@dataclass(frozen=True)
class Noise:
    """What is left of the values once variants and seeds have taken their part."""

    sd: float
    """Standard deviation of a single run."""
    freedom: int
    """Degrees of freedom that it was estimated with."""


def estimate(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate | None:
    """The mean of values with its Student's t interval.

    Args:
        values: one for each seed; those that are not finite are not counted.
        confidence: the share of such intervals that hold the true mean.

    Returns:
        None where there are no values. One value has no interval.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None
    mean = float(np.mean(finite))
    if len(finite) < 2:
        return Estimate(mean, len(finite))
    sd = float(np.std(finite, ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, len(finite) - 1)) * sd / math.sqrt(len(finite))
    return Estimate(mean, len(finite), sd, mean - half, mean + half)


def paired(
    variant: Mapping[int, float], reference: Mapping[int, float], confidence: float = CONFIDENCE
) -> Paired | None:
    """Compare two variants seed by seed.

    Args:
        variant: seed -> value of the finished runs.
        reference: the same of what it is compared with.
        confidence: of the interval; 1 - confidence is the significance level that ``detectable`` is
            for.

    Returns:
        None where no seed finished for both.
    """
    seeds = tuple(s for s in sorted(variant) if s in reference and math.isfinite(variant[s] - reference[s]))
    difference = estimate([variant[s] - reference[s] for s in seeds], confidence)
    if difference is None:
        return None
    if difference.sd is None:
        return Paired(difference, seeds, None, None)
    detectable = detectable_difference(difference.sd, len(seeds), alpha=1 - confidence)
    p = _two_sided(difference.mean, difference.sd / math.sqrt(len(seeds)), len(seeds) - 1)
    return Paired(difference, seeds, p, detectable)


def _two_sided(mean: float, error: float, freedom: float) -> float:
    """The p value of a mean with a standard error."""
    if error == 0:  # the limit: t is infinite, or there is nothing to test
        return 1.0 if mean == 0 else 0.0
    return float(2 * stats.t.sf(abs(mean) / error, freedom))


def shared_noise(values: Mapping[str, Mapping[int, float]]) -> Noise | None:
    """The noise of a single run, from all variants together: value = variant + seed + noise, by
    least squares.

    It holds as far as all variants are equally noisy and a seed moves all of them alike.

    Args:
        values: variant -> seed -> value of the finished runs.

    Returns:
        None where variants and seeds leave nothing over.
    """
    cells = [(v, s, x) for v, runs in values.items() for s, x in runs.items() if math.isfinite(x)]
    variants = {v: i for i, v in enumerate(dict.fromkeys(v for v, _, _ in cells))}
    seeds = {s: len(variants) + i for i, s in enumerate(dict.fromkeys(s for _, s, _ in cells))}
    design = np.zeros((len(cells), len(variants) + len(seeds)))
    for row, (v, s, _) in enumerate(cells):
        design[row, [variants[v], seeds[s]]] = 1
    measured = np.array([x for _, _, x in cells])
    freedom = len(cells) - int(np.linalg.matrix_rank(design)) if cells else 0
    if freedom < 1:
        return None
    residual = measured - design @ np.linalg.lstsq(design, measured, rcond=None)[0]
    return Noise(math.sqrt(float(residual @ residual) / freedom), freedom)


def with_noise(difference: Estimate, noise: Noise, confidence: float = CONFIDENCE) -> tuple[Estimate, float]:
    """A paired difference judged by the noise of all variants instead of its own.

    Returns:
        The difference with its interval, and the two-sided p value.
    """
    error = noise.sd * math.sqrt(2 / difference.n)
    half = float(stats.t.ppf((1 + confidence) / 2, noise.freedom)) * error
    mean = difference.mean
    judged = Estimate(mean, difference.n, noise.sd * math.sqrt(2), mean - half, mean + half)
    return judged, _two_sided(mean, error, noise.freedom)


def welch(old: Sequence[float], new: Sequence[float], confidence: float = CONFIDENCE) -> tuple[Estimate, float] | None:
    """How the mean of new values differs from that of old ones that have nothing in common with
    them (Welch's t).

    Returns:
        New minus old with its interval, and the p value; None where either has fewer than two
        values.
    """
    if len(old) < 2 or len(new) < 2:
        return None
    variances = [float(np.var(values, ddof=1)) / len(values) for values in (old, new)]
    mean, error = float(np.mean(new) - np.mean(old)), math.sqrt(sum(variances))
    if error == 0:
        return Estimate(mean, len(new), 0.0, mean, mean), _two_sided(mean, 0.0, 1)
    freedom = error**4 / sum(v**2 / (len(values) - 1) for v, values in zip(variances, (old, new), strict=True))
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * error
    judged = Estimate(mean, len(new), error * math.sqrt(len(new)), mean - half, mean + half)
    return judged, _two_sided(mean, error, freedom)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p values for being several, after Holm: rejecting those at most alpha errs anywhere
    with at most alpha.

    Args:
        p_values: of all comparisons that are looked at together; None for one that could not be
            tested, which does not count.

    Returns:
        The adjusted values in the same order, each at most 1.
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, i) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = highest
    return adjusted


def detectable_difference(sd: float, n: int, *, alpha: float = 1 - CONFIDENCE, power: float = POWER) -> float | None:
    """The smallest true mean difference that a paired t test shows with the given power.

    Args:
        sd: standard deviation of the differences between pairs.
        n: pairs.
        alpha: two-sided significance level.
        power: the chance that the test comes out significant, with the right sign.

    Returns:
        The difference, in the unit of ``sd``; None for fewer than two pairs, which show nothing.
    """
    return None if n < 2 else sd * _detectable_effect(n, alpha, power)


@functools.cache
def _detectable_effect(n: int, alpha: float, power: float) -> float:
    """The same in standard deviations."""
    critical = float(stats.t.ppf(1 - alpha / 2, n - 1))

    def missing(effect: float) -> float:
        return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n))) - power

    upper = 1 / math.sqrt(n)
    while missing(upper) < 0:
        upper *= 2
    return float(optimize.brentq(missing, 0.0, upper, xtol=1e-6))
