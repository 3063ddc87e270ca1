"""The best learning rate between those that were tried, and how well they tell it.

Near its minimum, loss is about a parabola in the logarithm of the rate. The optimum is the
parabola's vertex, by least squares; its interval is that of Fieller (1954), exact for a ratio of
normal estimates, and without an end where the losses do not tell that the parabola bends up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats
from statsmodels.regression.linear_model import OLS

ALPHA = 0.05
LEAST = 4
"""Rates for a fit: one more than a parabola has parameters, so that the misfit can be judged."""


@dataclass(frozen=True)
class Optimum:
    """A learning rate, and what is known of its error."""

    rate: float
    low: float | None = None
    """The interval's ends; None where the rate is merely the best of those tried."""
    high: float | None = None
    at_edge: bool = False
    """Whether it is the lowest or highest rate tried: the optimum may lie beyond."""

    @property
    def fitted(self) -> bool:
        """Whether it lies on a parabola."""
        return self.low is not None


def optimum(losses: Mapping[float, float]) -> Optimum:
    """The vertex of a parabola through losses by rate, or the best rate where there is none: of
    fewer than `LEAST` finite losses, or where the vertex is not between the rates.

    Args:
        losses: rate -> loss, one of them finite at least.
    """
    finite = {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
    best = min(finite, key=lambda rate: finite[rate])
    plain = Optimum(best, at_edge=best in (min(losses), max(losses)))
    if len(finite) < LEAST:
        return plain
    x, y = np.log(list(finite)), list(finite.values())
    middle = float(x.mean())
    fit = OLS(y, np.vander(x - middle, 3, increasing=True)).fit()
    (_, slope, bend), freedom = fit.params, fit.df_resid
    at = middle - slope / (2 * bend) if bend > 0 else math.nan
    if not x[0] < at < x[-1]:
        return plain
    scale = np.array([-1.0, 2.0])
    low, high = _fieller(-slope, 2 * bend, fit.cov_params()[1:, 1:] * np.outer(scale, scale), freedom)
    return Optimum(math.exp(at), _exp(middle + low), _exp(middle + high))


def _fieller(a: float, b: float, covariance: np.ndarray, freedom: float) -> tuple[float, float]:
    """The interval of a / b; infinite where b may be 0."""
    t = float(stats.t.ppf(1 - ALPHA / 2, freedom))
    (va, vab), (_, vb) = t**2 * covariance
    if b**2 <= vb:
        return -math.inf, math.inf
    middle, half = a * b - vab, math.sqrt(max((a * b - vab) ** 2 - (a**2 - va) * (b**2 - vb), 0.0))
    return (middle - half) / (b**2 - vb), (middle + half) / (b**2 - vb)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
