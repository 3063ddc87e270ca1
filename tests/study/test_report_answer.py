"""The answer at a report's top: the best head ratio, by how much, how surely, and the paper's
claim.
"""

from __future__ import annotations

import re
from typing import Any

from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.study.findings import Study
from motifarch.study.report_answer import answer, facts

ONE, TWO, FOUR, SEVEN = "diff_v1 poly_norm", "gda 2:1 poly_norm", "gda 4:1 poly_norm", "gda 7:1 poly_norm"
# What seeds do to all, and to each alone: both sum to nothing, so that means are what they are set
# to.
SEEDS = (0.0, 0.05, -0.05)
OWN = {ONE: (1, -1, 0), TWO: (0, 1, -1), FOUR: (-1, 0, 1), SEVEN: (1, 0, -1)}


def study(means: dict[str, float], noise: float, *, others: float = 3.0, seeds: tuple[int, ...] = (0, 1, 2)) -> Study:
    """A study in which each variant has this mean loss, and each run its own noise beside its
    seed's.
    """
    results: dict[str, Any] = made_up_results(seeds=seeds)
    for run in results["runs"]:
        own = OWN.get(run["variant"], (0, 0, 0))[run["seed"]]
        run["validation_loss"] = means.get(run["variant"], others) + SEEDS[run["seed"]] + noise * own
    return Study(results)


def told(found: Study) -> tuple[str, str]:
    return answer(found, found.main_group)


def test_a_ratio_that_beats_each_other_one_is_called_the_best_with_its_difference_and_p() -> None:
    found = study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45}, 1e-4)
    first, more = told(found)
    losses = [
        [found.values(v, "validation_loss")[s] for s in (0, 1, 2)] for v in found.variants if v.name in (ONE, FOUR)
    ]
    test = stats.ttest_rel(*losses)
    half = (test.confidence_interval().high - test.confidence_interval().low) / 2
    # Six comparisons with 1:1 and three more between ratios; which rank this one has among them is
    # Holm's business.
    one, four = (next(v for v in found.variants if v.name == name) for name in (ONE, FOUR))
    assert test.pvalue <= found.compared(four, one).p_holm <= 9 * test.pvalue
    assert first.startswith("GDA 4:1 is the best of 4 head ratios: its mean validation loss is 2.4000 nats, ")
    assert f" 0.2000 ± {half:.4f} (7.69%) below DIFF V1 (1:1). Seeds do not explain it (paired t test, p" in first
    assert "after Holm's correction" in first
    assert "GDA 2:1 and GDA 7:1 are worse too." in more


def test_a_better_ratio_that_costs_more_says_so() -> None:
    found = study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45}, 1e-4)
    rows = {v.name: v.row for v in found.variants}
    for key in ("training_flops_per_token", "kv_bytes_per_token"):
        rows[FOUR][key] = rows[ONE][key]
    assert "needs" not in told(found)[1]
    rows[FOUR]["training_flops_per_token"] = 1.163 * rows[ONE]["training_flops_per_token"]
    _, more = told(found)
    assert more.startswith(
        "At equal parameters, GDA 4:1 needs 16.3% more training operations a token than DIFF V1 (1:1)."
    )


def test_where_only_some_ratios_are_worse_the_rest_are_named() -> None:
    first, more = told(study({ONE: 2.6, TWO: 2.4001, FOUR: 2.4, SEVEN: 2.5}, 1e-3))
    assert first.startswith("GDA 4:1 has the lowest mean validation loss of 4 head ratios")
    assert "GDA 7:1 is worse too" in more
    assert "GDA 2:1 is not told apart from GDA 4:1." in more


def test_noise_that_hides_everything_leaves_no_best() -> None:
    first, more = told(study({ONE: 2.601, TWO: 2.6, FOUR: 2.599, SEVEN: 2.6}, 0.05))
    assert first.startswith("No head ratio is shown to be best. GDA 4:1 has the lowest mean validation loss")
    assert "Seeds alone may explain it (paired t test, p = " in first
    assert "neither supports nor refutes it" in more
    assert "worse too" not in more


def test_what_only_shared_noise_shows_is_said_to_rest_on_it() -> None:
    """Three pairs alone allow little; the other variants' quiet runs tell how noisy these are."""
    first, _ = told(study({ONE: 2.61, TWO: 2.609, FOUR: 2.6, SEVEN: 2.608}, 0.0012))
    assert "If all variants are equally noisy, seeds do not explain it (p " in first
    assert "by its own pairs alone they may (paired t test, p = " in first


def test_where_one_to_one_is_best_it_is_compared_with_the_next_and_the_claim_is_contradicted() -> None:
    first, more = told(study({ONE: 2.4, TWO: 2.45, FOUR: 2.5, SEVEN: 2.6}, 1e-4))
    assert first.startswith("DIFF V1 (1:1) is the best of 4 head ratios")
    assert "(2.04%) below GDA 2:1." in first
    assert "here 4:1's loss is 4.17% higher, which contradicts it" in more


def test_the_papers_claim_is_told_beside_what_was_found_here_with_its_interval() -> None:
    found = study({ONE: 2.6, TWO: 2.598, FOUR: 2.535, SEVEN: 2.598}, 5e-4)
    _, more = told(found)
    assert "The GDA paper (arXiv 2510.06949) reports about 2.5% for 4:1 over 1:1" in more
    ends = re.search(
        r"here 4:1's loss is 2.50% lower \(95% interval ([\d.]+)% to ([\d.]+)%\), in the same direction", more
    )
    assert ends
    assert float(ends[1]) < 2.5 < float(ends[2])


def test_a_claim_that_only_shared_noise_bears_out_says_what_it_rests_on() -> None:
    found = study({ONE: 2.61, TWO: 2.609, FOUR: 2.6, SEVEN: 2.608}, 0.0012)
    one, four = (next(v for v in found.variants if v.name == name) for name in (ONE, FOUR))
    assert not found.compared(four, one).significant
    assert ", if all variants are equally noisy), in the same direction" in told(found)[1]


def test_without_both_ratios_of_the_claim_nothing_is_said_of_it() -> None:
    found = study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45}, 1e-4)
    _, more = answer(found, [v for v in found.main_group if v.ratio != 4])
    assert "paper" not in more


def test_attention_without_a_ratio_that_does_better_is_named() -> None:
    _, more = told(study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45, "diff_v2 poly_norm": 2.3}, 1e-4))
    assert "DIFF V2 (by 0.1000 ± 0.000" in more
    assert "is lower still, without a head ratio (paired 95% intervals, not tested)." in more
    assert "softmax" not in more


def test_one_seed_is_told_and_not_tested() -> None:
    first, more = told(study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45}, 0.0, seeds=(0,)))
    assert first.startswith("No head ratio is shown to be best. GDA 4:1 has the lowest")
    assert first.endswith("0.2000 (7.69%) below DIFF V1 (1:1). One seed in common allows no test of its own.")
    assert "neither supports nor refutes" in more


def test_a_study_that_is_under_way_is_judged_on_the_seeds_that_all_have_finished() -> None:
    """The worst ratio alone has come further: that makes it no winner, nor does a later seed's
    luck.
    """
    found = study({ONE: 2.6, TWO: 2.5, FOUR: 2.4, SEVEN: 2.45}, 1e-4)
    for run in found.runs:
        if run["seed"] > 0 and run["variant"] != ONE:
            run.update(status="missing")
    first, _ = told(found)
    assert "GDA 4:1 has the lowest mean validation loss of 4 head ratios" in first
    assert "0.2002 (7.70%) below DIFF V1 (1:1). One seed in common allows no test of its own" in first


def test_a_ratio_of_which_only_lucky_seeds_are_left_does_not_win() -> None:
    found = study({ONE: 2.6, TWO: 2.3, FOUR: 2.4, SEVEN: 2.45}, 1e-4)
    for run in found.runs:
        if run["seed"] == 2 and run["variant"] == TWO:
            run.update(status="failed")
    first, more = told(found)
    assert first.startswith("GDA 4:1 ")
    assert " of 3 head ratios whose runs failed least" in first
    assert "below DIFF V1 (1:1)" in first
    assert "GDA 2:1 is better on the seeds that both finished" in more


def test_a_ratio_without_finished_runs_is_not_counted() -> None:
    names = [(SEVEN, seed) for seed in (0, 1, 2)]
    first, _ = told(Study(made_up_results(failed=tuple(names))))
    assert "of 3 head ratios that have finished runs, " in first
    names += [(name, seed) for name in (ONE, TWO) for seed in (0, 1, 2)]
    first, _ = told(Study(made_up_results(failed=tuple(names))))
    assert first == "Only one head ratio has finished runs, GDA 4:1: there is nothing to compare it with."


def test_of_several_groups_the_largest_models_are_answered_for_and_named() -> None:
    results = made_up_results(activations=("poly_norm", "silu"), sizes=("2m", "8m"))
    for v in results["variants"]:
        v["parameters"] *= 4 if v["size"] == "8m" else 1
    first, _ = told(Study(results))
    assert first.startswith("8m, PolyNorm: ")


def test_facts_say_which_attention_ran_with_which_feed_forward() -> None:
    results = made_up_results(activations=("poly_norm", "silu"))
    assert (
        "and DIFF V2 with PolyNorm and SwiGLU, equal in parameters: 2.10 to 2.11 million parameters, 4 million"
        in facts(Study(results))
    )
    for part in ("variants", "runs"):
        name = "name" if part == "variants" else "variant"
        results[part] = [r for r in results[part] if "silu" not in r[name] or r[name] == "softmax gqa silu"]
    assert "and DIFF V2 with PolyNorm; softmax GQA with SwiGLU, equal in parameters: " in facts(Study(results))
