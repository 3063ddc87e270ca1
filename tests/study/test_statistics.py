"""Intervals, paired tests, Holm's correction and power: on known distributions, and against scipy's
own tests.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from motifarch.study.statistics import (
    detectable_difference,
    estimate,
    holm,
    paired,
    shared_noise,
    welch,
    with_noise,
)

STUDIES = 2000


def within(successes: int, trials: int, share: float) -> bool:
    """Whether a count is what chance makes of that share, but for one time in a million."""
    return bool(stats.binomtest(successes, trials, share).pvalue > 1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 8])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_as_many_intervals_hold_the_true_mean_as_they_say(seeds: int, confidence: float) -> None:
    draws = np.random.default_rng(seeds).normal(2.7, 0.01, (STUDIES, seeds))
    found = [estimate(list(draw), confidence) for draw in draws]
    held = sum(e.lower <= 2.7 <= e.upper for e in found)
    assert within(held, STUDIES, confidence), held / STUDIES


def test_an_interval_is_scipys() -> None:
    values = [2.61, 2.66, 2.59, 2.7]
    found = estimate(values, 0.9)
    low, high = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found is not None
    assert (found.mean, found.lower, found.upper) == pytest.approx((np.mean(values), low, high), rel=1e-12)


def draw_study(rng: np.random.Generator, variants: int, seeds: int) -> np.ndarray:
    """Losses of equal variants, (variants, seeds): a seed moves all by far more than a run's own
    noise.
    """
    return 2.7 + rng.normal(0, 0.05, seeds) + rng.normal(0, 0.004, (variants, seeds))


def test_equal_variants_differ_significantly_as_often_as_the_level_says_and_seeds_do_not_hide_it() -> None:
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(STUDIES):
        a, b = draw_study(rng, 2, 3)
        found = paired(dict(enumerate(a)), dict(enumerate(b)))
        assert found is not None
        alarms += found.p <= 0.05
    assert within(alarms, STUDIES, 0.05), alarms / STUDIES


def families(correct: bool) -> int:
    """Studies of seven equal variants in which at least one of six differs from the first."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(STUDIES // 2):
        table = [dict(enumerate(row)) for row in draw_study(rng, 7, 4)]
        p = [paired(row, table[0]).p for row in table[1:]]
        alarms += min(holm(p) if correct else p) <= 0.05
    return alarms


def test_after_holm_a_study_of_equal_variants_raises_any_false_alarm_at_most_as_often_as_the_level_says() -> None:
    corrected = families(correct=True)
    # At most: differences from one reference go together, and the correction allows for the worst.
    assert stats.binomtest(corrected, STUDIES // 2, 0.05, alternative="greater").pvalue > 1e-6
    # Without it, the same studies do raise more.
    assert stats.binomtest(families(correct=False), STUDIES // 2, 0.05, alternative="greater").pvalue < 1e-6


def test_a_paired_test_is_scipys() -> None:
    a, b = [2.61, 2.66, 2.59, 2.7], [2.63, 2.69, 2.58, 2.75]
    theirs = stats.ttest_rel(a, b)
    ours = paired(dict(enumerate(a)), dict(enumerate(b)))
    assert ours is not None
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = theirs.confidence_interval(0.95)
    assert (ours.difference.lower, ours.difference.upper) == pytest.approx((interval.low, interval.high), rel=1e-10)


def test_welchs_test_is_scipys() -> None:
    old, new = [100.0, 104.0, 99.0], [110.0, 111.0, 123.0, 108.0]
    theirs = stats.ttest_ind(new, old, equal_var=False)
    found = welch(old, new)
    assert found is not None
    assert found[1] == pytest.approx(theirs.pvalue, rel=1e-10)
    interval = theirs.confidence_interval(0.95)
    assert (found[0].lower, found[0].upper) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert welch([1.0], new) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_its_definition_does(p: list[float]) -> None:
    """Step down: the smallest p against alpha / m, the next against alpha / (m - 1), until one is
    too large.
    """
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.3):
        rejected = set()
        for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - rank) > alpha:
                break
            rejected.add(i)
        assert rejected == {i for i, value in enumerate(adjusted) if value <= alpha}


def test_holm_is_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="statsmodels is not installed")
    p = [0.011, 0.02, 0.001, 0.2, 0.011]
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


@pytest.mark.parametrize(
    ("p", "adjusted"),
    [
        # The worked example of many texts on it.
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
        # What statsmodels' multipletests(p, method="holm") gives.
        ([0.011, 0.02, 0.001, 0.2, 0.011], [0.044, 0.044, 0.005, 0.2, 0.044]),
    ],
)
def test_holm_gives_known_numbers(p: list[float], adjusted: list[float]) -> None:
    assert holm(p) == pytest.approx(adjusted)


def test_a_negated_estimate_is_that_of_the_negated_values() -> None:
    values = [0.1, -0.3, 0.4]
    assert -estimate(values) == estimate([-v for v in values])


def test_holm_leaves_out_what_could_not_be_tested() -> None:
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]


def test_runs_that_are_missing_take_their_pairs_with_them_and_nothing_else() -> None:
    variant, reference = {0: 1.0, 1: 2.0, 3: 5.0}, {0: 1.5, 2: 7.0, 3: 5.2}
    found = paired(variant, reference)
    assert found is not None
    assert found.seeds == (0, 3)
    assert found.difference.mean == pytest.approx(-0.35)
    one = paired({0: 1.0, 1: math.nan}, {0: 1.5, 1: 2.0})
    assert one is not None
    assert (one.difference.n, one.difference.lower, one.p, one.detectable) == (1, None, None, None)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert estimate([]) is None


@pytest.mark.parametrize("pairs", [3, 6])
def test_a_difference_that_is_said_to_be_detectable_is_detected_as_often_as_said(pairs: int) -> None:
    sd = 0.004
    difference = detectable_difference(sd, pairs)
    rng = np.random.default_rng(3)
    detected = 0
    for _ in range(STUDIES):
        deltas = rng.normal(difference, sd, pairs)
        detected += paired(dict(enumerate(deltas)), dict.fromkeys(range(pairs), 0.0)).p <= 0.05
    assert within(detected, STUDIES, 0.8), detected / STUDIES
    assert detectable_difference(sd, 1) is None


def test_shared_noise_is_the_residual_of_a_two_way_analysis_of_variance() -> None:
    table = draw_study(np.random.default_rng(4), 5, 3)
    found = shared_noise({str(v): dict(enumerate(row)) for v, row in enumerate(table)})
    residual = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert found is not None
    assert found.freedom == 8
    assert found.sd == pytest.approx(math.sqrt((residual**2).sum() / 8), rel=1e-8)


def test_shared_noise_finds_more_and_still_keeps_the_level_also_where_runs_are_missing() -> None:
    rng = np.random.default_rng(5)
    alarms, sd = 0, []
    for _ in range(STUDIES // 2):
        table = {str(v): dict(enumerate(row)) for v, row in enumerate(draw_study(rng, 5, 3))}
        del table["4"][2], table["3"][0]
        noise = shared_noise(table)
        assert noise is not None
        assert noise.freedom == 6
        sd.append(noise.sd)
        _, p = with_noise(paired(table["1"], table["0"]).difference, noise)
        alarms += p <= 0.05
    assert within(alarms, STUDIES // 2, 0.05)
    assert np.sqrt(np.mean(np.square(sd))) == pytest.approx(0.004, rel=0.05)
    assert shared_noise({"a": {0: 1.0, 1: 2.0}}) is None
