"""--compare: changes beyond their noise are called moved, others are not, whatever kind of
results.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.errors import UserError
from motifarch.study.comparison import compare, read_results, section
from motifarch.study.report import write_report

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def verdicts(comparison: dict[str, Any], measure: str) -> dict[str, tuple[str, bool | None]]:
    return {r["what"]: (r["verdict"], r["better"]) for r in comparison["rows"] if r["measure"] == measure}


def test_the_same_results_have_not_moved() -> None:
    results = made_up_results()
    assert {r["verdict"] for r in compare(results, results)["rows"]} <= {"the same", "within noise"}


def test_losses_are_compared_seed_by_seed() -> None:
    """All losses fall by less than seeds differ, but by the same in each of them."""
    old, new = made_up_results(), made_up_results(shift=-0.004)
    rng = np.random.default_rng(0)
    for run in new["runs"]:
        run["validation_loss"] += 1e-5 * rng.standard_normal()
    assert set(verdicts(compare(new, old), "validation loss").values()) == {("moved", True)}
    # With other seeds nothing pairs them, and the change drowns in what seeds differ by.
    others = made_up_results(seeds=(3, 4, 5), shift=-0.004)
    assert set(verdicts(compare(others, old), "validation loss").values()) == {("within noise", None)}


def test_speeds_are_judged_by_welchs_test_over_runs_after_holm() -> None:
    old, new = made_up_results(), made_up_results()
    for run in new["runs"]:
        if run["variant"] == "gda 4:1 poly_norm":
            run["speed"]["train_tokens_per_s"] *= 0.7
    comparison = compare(new, old)
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


def test_one_run_each_has_no_noise_and_so_no_verdict() -> None:
    comparison = compare(made_up_results(seeds=(0,), shift=0.1), made_up_results(seeds=(0,)))
    assert set(verdicts(comparison, "validation loss").values()) == {("noise unknown", None)}


def test_what_is_new_what_is_gone_and_other_settings_are_noted() -> None:
    old, new = made_up_results(), made_up_results()
    new["variants"][0] = new["variants"][0] | {"name": "softmax mqa poly_norm"}
    new["grid"]["tokens"] *= 2
    new["environment"]["cpu"] = "another processor"
    notes = " ".join(compare(new, old)["notes"])
    assert "new variants: softmax mqa" in notes
    assert "variants gone: softmax MHA" in notes
    assert "settings differ in tokens" in notes
    assert "another machine" in notes


@pytest.mark.parametrize("name", ["train_step_cpu", "attention_cpu", "poly_norm_cpu", "combine_cpu", "generate_cpu"])
def test_committed_benchmarks_are_compared_by_the_spread_of_their_repetitions(name: str) -> None:
    old = read_results(COMMITTED / f"{name}.json")
    new = copy.deepcopy(old)
    assert {r["verdict"] for r in compare(new, old)["rows"]} == {"within noise"}

    def slower(content: Any) -> None:
        """Twice the times, half the rates."""
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, dict) and value.keys() >= {"median", "lower", "upper"}:
                factor = 0.5 if "per_second" in str(key) else 2.0
                content[key] = {k: v * factor for k, v in value.items()}
            elif isinstance(value, dict | list):
                slower(value)

    slower(new)
    comparison = compare(new, old)
    moved = [r for r in comparison["rows"] if r["verdict"] == "moved"]
    assert len(moved) > 0.9 * len(comparison["rows"])
    assert all(r["better"] is False for r in moved)


def test_the_report_shows_what_moved(tmp_path: Path) -> None:
    results = made_up_results(shift=-0.01)
    results["comparison"] = compare(results, made_up_results())
    write_report(results, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "## What moved" in text
    assert "moved: better" in text
    assert section(results["comparison"]).title == "What moved"
    json.dumps(results)  # it is written into the results file


def test_old_results_that_can_not_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read_results(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("no json")
    with pytest.raises(UserError, match="is no JSON"):
        read_results(tmp_path / "text.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "other.json")
    with pytest.raises(UserError, match="nothing to compare: the new results hold study, the old ones train_step"):
        compare(made_up_results(), read_results(COMMITTED / "train_step_cpu.json"))
