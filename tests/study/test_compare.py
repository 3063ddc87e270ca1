"""--compare: changes beyond their noise are called moved, others are not."""

import json
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.study.compare import compare_studies
from motifarch.study.report import to_markdown


def verdicts(comparison: dict[str, Any], measure: str) -> dict[str, tuple[str, bool | None]]:
    return {r["what"]: (r["verdict"], r["better"]) for r in comparison["rows"] if r["measure"] == measure}


def test_losses_are_compared_seed_by_seed() -> None:
    """All losses fall by less than seeds differ, but by the same in each of them."""
    old, new = made_up_results(), made_up_results(shift=-0.004)
    rng = np.random.default_rng(0)
    for run in new["runs"]:
        run["validation_loss"] += 1e-5 * rng.standard_normal()
    assert set(verdicts(compare_studies(new, old), "validation loss").values()) == {("moved", True)}
    # With other seeds nothing pairs them, and the change drowns in what seeds differ by.
    others = made_up_results(seeds=(3, 4, 5), shift=-0.004)
    assert set(verdicts(compare_studies(others, old), "validation loss").values()) == {("within noise", None)}
    # One run each has no noise, and so no verdict.
    one = compare_studies(made_up_results(seeds=(0,), shift=0.1), made_up_results(seeds=(0,)))
    assert set(verdicts(one, "validation loss").values()) == {("noise unknown", None)}
    assert {r["verdict"] for r in compare_studies(old, old)["rows"]} <= {"the same", "within noise"}


def test_speeds_are_judged_by_welchs_test_over_runs_after_holm() -> None:
    old, new = made_up_results(), made_up_results()
    for run in new["runs"]:
        if run["variant"] == "gda 4:1 poly_norm":
            run["speed"]["train_tokens_per_s"] *= 0.7
    comparison = compare_studies(new, old)
    found = verdicts(comparison, "training tokens/s")
    assert found.pop("GDA 4:1, PolyNorm") == ("moved", False)
    assert {verdict for verdict, _ in found.values()} == {"within noise"}
    row = next(r for r in comparison["rows"] if r["verdict"] == "moved")
    values = [
        [r["speed"]["train_tokens_per_s"] for r in results["runs"] if r["variant"] == "gda 4:1 poly_norm"]
        for results in (new, old)
    ]
    interval = stats.ttest_ind(*values, equal_var=False).confidence_interval(0.95)
    assert row["noise"] * row["old"] == pytest.approx((interval.high - interval.low) / 2)
    assert row["change"] == pytest.approx(-0.3)


def test_what_is_new_what_is_gone_and_other_settings_are_noted_in_the_report() -> None:
    old, new = made_up_results(), made_up_results(shift=-0.01)
    for row in (new["variants"][0], *new["runs"][:3]):
        row["name" if "name" in row else "variant"] = "softmax mqa poly_norm"
    new["grid"]["tokens"] *= 2
    new["environment"]["cpu"] = "another processor"
    new["comparison"] = json.loads(json.dumps(compare_studies(new, old)))
    text = to_markdown(new)
    for said in ("new variants: softmax mqa", "variants gone: softmax MHA", "differ in tokens", "another machine"):
        assert said in text
    assert "| **GDA 4:1, PolyNorm** | **validation loss** | **moved: better** |" in text
