"""What seeds allow to say: levels kept in simulations, and comparisons over whole studies."""

import gc
import math

import numpy as np
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.errors import UserError
from motifarch.study.analysis import (
    StudyResults,
    detectable_difference,
    estimate,
    holm,
    paired,
    read_results,
    shared_noise,
    with_noise,
)

STUDIES = 2000


def within(successes: int, trials: int, share: float) -> bool:
    """Whether a count is what chance makes of that share, but for one time in a million."""
    return bool(stats.binomtest(successes, trials, share).pvalue > 1e-6)


def draw_study(rng: np.random.Generator, variants: int, seeds: int) -> np.ndarray:
    """Losses of equal variants, (variants, seeds): a seed moves all far more than a run's noise."""
    return 2.7 + rng.normal(0, 0.05, seeds) + rng.normal(0, 0.004, (variants, seeds))


def test_equal_variants_differ_significantly_as_often_as_the_level_says_and_seeds_do_not_hide_it() -> None:
    rng = np.random.default_rng(1)
    alarms = held = 0
    for _ in range(STUDIES):
        a, b = draw_study(rng, 2, 3)
        found = paired(dict(enumerate(a)), dict(enumerate(b)))
        alarms += found.p <= 0.05
        held += abs(found.mean) <= found.half
    assert within(alarms, STUDIES, 0.05), alarms / STUDIES
    assert held == STUDIES - alarms


def families(correct: bool) -> int:
    """Studies of seven equal variants in which at least one of six differs from the first."""
    rng = np.random.default_rng(2)
    alarms = 0
    for _ in range(STUDIES):
        table = [dict(enumerate(row)) for row in draw_study(rng, 7, 4)]
        p = [paired(row, table[0]).p for row in table[1:]]
        alarms += min(holm(p) if correct else p) <= 0.05
    return alarms


def test_after_holm_a_study_of_equal_variants_raises_any_false_alarm_at_most_as_often_as_the_level_says() -> None:
    gc.freeze()  # statsmodels collects garbage at each call, which takes long where much is loaded
    # At most: differences from one reference go together, and the correction allows for the worst.
    assert stats.binomtest(families(correct=True), STUDIES, 0.05, alternative="greater").pvalue > 1e-6
    # Without it, the same studies do raise more.
    assert stats.binomtest(families(correct=False), STUDIES, 0.05, alternative="greater").pvalue < 1e-6


def test_shared_noise_keeps_the_level_also_where_runs_are_missing() -> None:
    rng = np.random.default_rng(5)
    alarms, sd = 0, []
    for _ in range(STUDIES):
        table = {str(v): dict(enumerate(row)) for v, row in enumerate(draw_study(rng, 5, 3))}
        del table["4"][2], table["3"][0]
        noise = shared_noise(table)
        assert noise.freedom == 6
        sd.append(noise.sd)
        alarms += with_noise(paired(table["1"], table["0"]), noise).p <= 0.05
    assert within(alarms, STUDIES, 0.05)
    assert np.sqrt(np.mean(np.square(sd))) == pytest.approx(0.004, rel=0.05)
    assert shared_noise({"a": {0: 1.0, 1: 2.0}}) is None


@pytest.mark.parametrize("pairs", [3, 6])
def test_a_detectable_difference_is_detected_as_often_as_said(pairs: int) -> None:
    sd = 0.004
    deltas = np.random.default_rng(3).normal(detectable_difference(sd, pairs), sd, (STUDIES, pairs))
    detected = sum(paired(dict(enumerate(row)), dict.fromkeys(range(pairs), 0.0)).p <= 0.05 for row in deltas)
    assert within(detected, STUDIES, 0.8), detected / STUDIES
    assert detectable_difference(sd, 1) is None
    # The solver finds the root for few pairs and small levels too.
    for n in (2, 3, 5, 20):
        for alpha in (0.05, 0.05 / 30):
            effect = detectable_difference(1.0, n, alpha) * math.sqrt(n)
            power = stats.nct.sf(stats.t.ppf(1 - alpha / 2, n - 1), n - 1, effect)
            assert power == pytest.approx(0.8, abs=1e-4)


def test_seeds_without_both_runs_make_no_pair() -> None:
    found = paired({0: 1.0, 1: 2.0, 3: 5.0}, {0: 1.5, 2: 7.0, 3: 5.2})
    assert (found.n, found.mean) == (2, pytest.approx(-0.35))
    one = paired({0: 1.0, 1: math.nan}, {0: 1.5, 1: 2.0})
    assert (one.n, one.half, one.p) == (1, None, None)
    assert paired({0: 1.0}, {1: 1.0}) is estimate([]) is None
    assert holm([0.01, None, 0.04]) == [0.02, None, 0.04]


def test_sizes_and_activations_are_kept_apart_in_one_family() -> None:
    study = StudyResults(made_up_results(activations=("poly_norm", "silu"), sizes=("2m", "8m")))
    for c in study.comparisons:
        assert c.variant.size == c.reference.size
        assert (c.variant.label == c.reference.label) != (c.variant.activation == c.reference.activation)
    # For each size: six against the reference and three between the other ratios, of either
    # activation, and seven between activations.
    assert len(study.comparisons) == 2 * (2 * (6 + 3) + 7)
    p = [c.difference.p for c in study.comparisons]
    assert min(c.p_holm for c in study.comparisons) == pytest.approx(min(p) * len(p))
    assert [v.label for v in study.variants[2:7]] == ["DIFF V1", "GDA 2:1", "GDA 4:1", "GDA 7:1", "DIFF V2"]


def test_failed_runs_count_nowhere_and_lucky_seeds_do_not_win() -> None:
    failed = (("gda 2:1 poly_norm", 1), ("gda 2:1 poly_norm", 2), ("diff_v2 poly_norm", 0))
    results = made_up_results(failed=failed)
    next(r for r in results["runs"] if r["variant"] == "gda 2:1 poly_norm")["validation_loss"] = 2.0
    study = StudyResults(results)
    assert study.best(study.variants).label == "GDA 4:1"
    pairs = {c.variant.label: c.difference for c in study.comparisons if c.reference.label == "DIFF V1"}
    assert pairs["GDA 2:1"].p is None
    assert pairs["DIFF V2"].n == 2
    # Nor does a later seed's luck, while a study is under way.
    results = made_up_results()
    for run in results["runs"]:
        if run["seed"] > 0 and run["variant"] != "gda 7:1 poly_norm":
            run["status"] = "missing"
        elif run["seed"] > 0:
            run["validation_loss"] -= 1.0
    study = StudyResults(results)
    assert study.best(study.variants).label != "GDA 7:1"


def test_other_results_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="kind 'something'"):
        StudyResults({"kind": "something"})
    found = {"none": (None, "can't be read"), "text": ("no json", "no JSON"), "other": ("{}", "no results")}
    for name, (content, message) in found.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            read_results(tmp_path / name)
