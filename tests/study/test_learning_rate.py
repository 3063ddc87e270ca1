"""The optimum of a sweep, on losses whose optimum is known."""

import math

import numpy as np
import pytest

from motifarch.study.learning_rate import optimum

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]


def losses(best: float, noise: float = 0.0, seed: int = 0) -> dict[float, float]:
    error = np.random.default_rng(seed).normal(0, noise, len(RATES))
    return {rate: 3 + 0.1 * math.log(rate / best) ** 2 + e for rate, e in zip(RATES, error, strict=True)}


@pytest.mark.parametrize("best", [1.3e-3, 4e-3, 9e-3])
def test_the_vertex_between_rates_is_found(best: float) -> None:
    found = optimum(losses(best))
    assert found.rate == pytest.approx(best)
    assert found.low == pytest.approx(best)
    assert found.high == pytest.approx(best)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    found = [optimum(losses(4e-3, noise=0.01, seed=seed)) for seed in range(2000)]
    assert all(one.fitted for one in found)
    held = sum(one.low < 4e-3 < one.high for one in found)  # type: ignore[operator]
    assert held / 2000 == pytest.approx(0.95, abs=0.015)


def test_losses_that_do_not_tell_have_an_interval_without_ends() -> None:
    found = optimum(losses(4e-3, noise=0.3, seed=2))
    assert found.fitted
    assert (found.low, found.high) == (0.0, math.inf)


@pytest.mark.parametrize(
    ("given", "rate", "at_edge"),
    [
        ({1e-3: 3.2, 2e-3: 3.1, 4e-3: 3.3}, 2e-3, False),  # too few
        ({1e-3: 3.4, 2e-3: 3.3, 4e-3: 3.2, 8e-3: 3.1}, 8e-3, True),
        ({1e-3: 3.1, 2e-3: 3.2, 4e-3: 3.3, 8e-3: math.nan}, 1e-3, True),
        ({1e-3: 3.3, 2e-3: 3.2, 4e-3: 3.1, 8e-3: math.nan}, 4e-3, False),  # the next one diverged
    ],
)
def test_without_a_vertex_the_best_is_taken(given: dict[float, float], rate: float, at_edge: bool) -> None:
    found = optimum(given)
    assert (found.rate, found.at_edge, found.fitted) == (rate, at_edge, False)
