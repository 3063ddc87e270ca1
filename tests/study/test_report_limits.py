"""A report's limits: each from the study's own figures, and only where it applies."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.study.document import Items
from motifarch.study.findings import Study
from motifarch.study.report_limits import limits


def said(results: dict[str, Any]) -> dict[str, str]:
    """The limits by their first word."""
    (block,) = limits(Study(results)).blocks
    assert isinstance(block, Items)
    return {item.split(":")[0]: item for item in block.items}


def test_size_and_tokens_for_each_parameter_are_those_of_the_runs() -> None:
    results = made_up_results()
    assert said(results)["Size"].startswith("Size: 2.10 to 2.11 million parameters and 4 million tokens, 1.9 for each")
    for run in results["runs"]:
        run["tokens"] *= 10
    assert "40 million tokens, 19 for each parameter" in said(results)["Size"]


def test_the_text_and_its_vocabulary_are_those_of_the_grid() -> None:
    results = made_up_results()
    data = results["grid"]["data"]
    data.update(source=["stdlib"], vocab_size=2048, seq_len=256)
    text = said(results)["Text"]
    assert text.startswith(
        "Text: the source text of Python's standard library alone, in a vocabulary of 2,048 tokens that"
    )
    assert "256 tokens a sequence" in text
    data.update(tokenizer="gpt2")
    assert "in the tokens of gpt2, 256 tokens" in said(results)["Text"]
    # Data that was prepared before has a vocabulary that the grid knows nothing of.
    data.update(source=[], tokenizer=None, path="data/mine")
    assert said(results)["Text"].startswith("Text: data/mine alone, 256 tokens a sequence")


def test_seeds_come_with_the_smallest_difference_that_they_can_show() -> None:
    results = made_up_results()
    found = Study(results)
    halves = []
    for c in found.comparisons:
        pairs = [[found.values(v, "validation_loss")[s] for s in (0, 1, 2)] for v in (c.variant, c.reference)]
        interval = stats.ttest_rel(*pairs).confidence_interval()
        halves.append((interval.high - interval.low) / 2)
    text = said(results)["Seeds"]
    assert "3 seeds (0, 1, 2)" in text
    assert (
        f"reach {np.median(halves):.4f} nats to each side in the median ({min(halves):.4f} to {max(halves):.4f})"
        in text
    )
    alone, corrected = map(float, re.search(r"difference of (0\.\d{4}) nats.*one of (0\.\d{4})", text).groups())
    assert np.median(halves) < alone < corrected


def test_learning_rates_say_how_they_were_chosen() -> None:
    results = made_up_results()
    assert said(results)["Learning rates"].startswith(
        "Learning rates: one was given for all variants (0.003), tuned for"
    )
    names = [v["name"] for v in results["variants"]]
    results["sweep"] = [
        {"variant": name, "size": "2m", "seed": 0, "learning_rate": rate, "status": "finished", "tokens": 400_000}
        for name in names
        for rate in (0.002, 0.004, 0.008)
    ]
    results["variants"][4] |= {"learning_rate": 0.008, "learning_rate_at_edge": True}
    text = said(results)["Learning rates"]
    assert (
        "the best of 0.002, 0.004 and 0.008 in one short run each (0.4 million tokens instead of 4 million, seed 0)."
        in text
    )
    assert "steps of 2 times" in text
    assert "At an end of the grid: GDA 4:1;" in text
    assert "transferred" not in text
    results["variants"][3]["learning_rate_from"] = "transferred"
    assert "transferred to the larger models" in said(results)["Learning rates"]


def test_heads_that_follow_from_the_ratio_are_counted() -> None:
    results = made_up_results()
    for v, width in zip(results["variants"], (640, 640, 728, 664, 536, 344, 552), strict=True):
        v["model"]["intermediate_size"] = width
    text = said(results)["Heads"]
    assert "every ratio has 2 noise heads" in text
    assert (
        "2 in DIFF V1, 4 in GDA 2:1, 8 in GDA 4:1 and 14 in GDA 7:1 (softmax MHA 8, softmax GQA 8, DIFF V2 2)" in text
    )
    assert "728 wide in DIFF V1 and 344 in GDA 7:1" in text
    results["variants"] = [v for v in results["variants"] if v["attention"] != "gda"]
    results["runs"] = [r for r in results["runs"] if "gda" not in r["variant"]]
    assert "Heads" not in said(results)


def test_costs_say_what_was_equal_and_how_far_the_rest_is_apart() -> None:
    results = made_up_results()
    for v, share in zip(results["variants"], (0, 0.01, -0.0157, 0.0111, 0, 0.1439, 0.07), strict=True):
        v.update(parameters=2_500_000, training_flops_per_token=1e7 * (1 + share), kv_bytes_per_token=1024)
    results["variants"][2]["parameters"] = 2_505_000
    text = said(results)["Cost"]
    assert text.startswith("Cost: parameters are equal, to 0.20% of GDA 4:1's; training operations a token differ by ")
    assert "−1.6% (DIFF V1) to +14.4% (GDA 7:1) and key/value cache bytes a token are equal too." in text
    results["matching"]["by"] = "kv_cache"
    assert said(results)["Cost"].startswith("Cost: key/value cache bytes a token are equal, to 0.00%")


@pytest.mark.parametrize("jobs", [1, 2, 8])
def test_speeds_beside_other_runs_are_owned_up_to(jobs: int) -> None:
    results = made_up_results()
    results["starts"] = [{"jobs": 1}, {"jobs": jobs}]
    text = said(results).get("Speeds", "")
    assert (f"up to {jobs} runs went on side by side on 2 cores" in text) == (jobs > 1)


def test_a_lambda_below_zero_is_told_with_its_layer() -> None:
    results = made_up_results()
    assert "Lambda" not in said(results)
    for run in results["runs"]:
        if run["variant"] in ("gda 2:1 poly_norm", "diff_v2 poly_norm"):
            run["attention"]["layers"][1]["lambda"] = -0.0625
    assert "in layer 1 of GDA 2:1 (−0.062) and DIFF V2 (−0.062)" in said(results)["Lambda"]


def test_a_loss_that_still_falls_is_told_from_the_last_quarter_on() -> None:
    results = made_up_results()
    falls = [
        np.interp(0.75 * run["tokens"], *np.array(run["validation"])[:, [0, 2]].T) - run["validation_loss"]
        for run in results["runs"]
    ]
    assert f"still fell by {np.mean(falls):.4f} nats" in said(results)["Length"]
    for run in results["runs"]:
        run["validation"] = [[tokens, seconds, run["validation_loss"]] for tokens, seconds, _ in run["validation"]]
    assert "Length" not in said(results)
