"""What a report says: the figures of its results, what may be concluded from them, and what may not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.errors import UserError
from motifarch.study.findings import Study
from motifarch.study.report import write_report


def report(results: dict[str, Any], folder: Path) -> tuple[str, str]:
    """The page and the Markdown."""
    write_report(results, folder)
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


def losses(results: dict[str, Any], variant: str) -> list[float]:
    return [r["validation_loss"] for r in results["runs"] if r["variant"] == variant and r["status"] == "finished"]


def test_losses_have_the_mean_and_students_interval_of_their_seeds(tmp_path: Path) -> None:
    results = made_up_results()
    _, text = report(results, tmp_path)
    values = losses(results, "gda 4:1 poly_norm")
    half = stats.t.ppf(0.975, 2) * stats.sem(values)
    assert f"{np.mean(values):.4f} ± {half:.4f}" in text
    assert "The lowest mean validation loss is GDA 4:1's" in text


def test_differences_are_paired_with_the_one_to_one_variant_and_corrected(tmp_path: Path) -> None:
    results = made_up_results()
    page, text = report(results, tmp_path)
    gda, reference = losses(results, "gda 4:1 poly_norm"), losses(results, "diff_v1 poly_norm")
    test = stats.ttest_rel(gda, reference)
    row = next(line for line in text.splitlines() if "GDA 4:1" in line and line.count("|") == 10)
    assert f"−{np.mean(reference) - np.mean(gda):.4f}" in row
    assert f"{test.pvalue:.3f}" in row
    others = [v["name"] for v in results["variants"] if v["name"] != "diff_v1 poly_norm"]
    p = sorted(stats.ttest_rel(losses(results, name), reference).pvalue for name in others)
    smallest = min(c.p_holm for c in Study(results).comparisons)
    assert smallest == pytest.approx(p[0] * len(p))
    assert f"over all {len(p)} comparisons" in text
    assert "Holm" in page


def test_a_study_of_pure_noise_is_said_to_show_nothing(tmp_path: Path) -> None:
    results = made_up_results()
    rng = np.random.default_rng(0)
    for run in results["runs"]:
        run["validation_loss"] = 2.6 + 0.01 * rng.standard_normal()
    _, text = report(results, tmp_path)
    assert "no difference from DIFF V1 is beyond what seeds explain" in text.replace("No", "no")


def test_limits_name_size_tokens_seeds_and_what_could_have_been_seen(tmp_path: Path) -> None:
    _, text = report(made_up_results(), tmp_path)
    short = text.split("## In short")[1].split("\n## ")[0]
    assert "2.1 to 2.11 million parameters and saw 4 million tokens" in short
    assert "3 seeds (0, 1, 2)" in short
    runs = made_up_results()["runs"]
    # Validations are every tenth: the last one before the last quarter is the seventh.
    fall = np.mean([run["validation"][6][2] - run["validation_loss"] for run in runs])
    assert f"still fell by {fall:.4f} nats" in short
    assert re.search(r"a paired test of 3 seeds finds a true difference of 0\.\d{4} nats with 80% chance", short)


def test_failed_and_missing_runs_are_named_with_their_reason_and_count_nowhere(tmp_path: Path) -> None:
    results = made_up_results(failed=(("gda 2:1 poly_norm", 1), ("gda 2:1 poly_norm", 2), ("diff_v2 poly_norm", 0)))
    page, text = report(results, tmp_path)
    assert (
        "| GDA 2:1 | 1 | failed | the loss was not finite for 20 steps in a row \\| \\<stopped> at step 130 |" in text
    )
    assert "&lt;stopped&gt;" in page
    assert "<stopped>" not in page
    only = losses(results, "gda 2:1 poly_norm")
    assert f"| GDA 2:1 |  | {only[0]:.4f} |" in text  # one seed: no interval
    study = Study(results)
    # However lucky the seed that is left.
    assert study.best(study.variants).label == "GDA 4:1"
    pairs = {c.variant.label: c.paired for c in study.comparisons}
    assert pairs["GDA 2:1"].p is None
    assert pairs["DIFF V2"].seeds == (1, 2)
    assert "3 of 21 runs did not finish" in text


def test_a_study_in_which_nothing_finished_still_has_a_report(tmp_path: Path) -> None:
    names = [v["name"] for v in made_up_results()["variants"]]
    page, text = report(made_up_results(failed=tuple((name, s) for name in names for s in (0, 1, 2))), tmp_path)
    assert "No run finished." in text or "no run finished" in text.lower()
    assert page.endswith("</html>\n")


def test_one_seed_gives_figures_without_intervals_or_tests(tmp_path: Path) -> None:
    _, text = report(made_up_results(seeds=(7,)), tmp_path)
    assert "With fewer than two finished seeds there are no intervals and no tests." in text
    assert "one seed: no interval" in text
    assert "no difference could be tested" in text


def test_activations_and_sizes_are_kept_apart(tmp_path: Path) -> None:
    results = made_up_results(activations=("poly_norm", "silu"), sizes=("2m", "8m"))
    study = Study(results)
    assert [(size, activation) for size, activation, _ in study.groups()] == [
        ("2m", "PolyNorm"),
        ("2m", "SwiGLU"),
        ("8m", "PolyNorm"),
        ("8m", "SwiGLU"),
    ]
    for c in study.comparisons:
        assert c.variant.size == c.reference.size
        assert (c.variant.label == c.reference.label) != (c.variant.activation == c.reference.activation)
    # Six against the reference and seven between activations for each size: one family.
    assert len(study.comparisons) == 2 * (6 + 6 + 7)
    _, text = report(results, tmp_path)
    assert "GDA 4:1, SwiGLU, 8m" in text


def test_the_page_holds_what_it_takes_to_repeat_the_study(tmp_path: Path) -> None:
    results = made_up_results()
    page, text = report(results, tmp_path)
    for content in (page, text):
        for known in (results["command"], "a made-up processor", "0" * 40, "tokens: 4000000"):
            assert known in content
    for section in ("What was made equal", "Retrieval probe", "Attention statistics", "Speed, memory and cache"):
        assert f"## {section}" in text
        assert f">{section}</h2>" in page


def test_the_page_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    page, _ = report(made_up_results(), tmp_path)
    addresses = set(re.findall(r"""(?:https?:)?//[^\s"'<)]+""", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert "<script" not in page
    assert "url(" not in page


def test_the_same_results_make_the_same_page(tmp_path: Path) -> None:
    first = report(made_up_results(), tmp_path / "first")
    assert report(made_up_results(), tmp_path / "second") == first


def test_markdown_tables_are_whole(tmp_path: Path) -> None:
    _, text = report(made_up_results(activations=("poly_norm", "silu")), tmp_path)
    width = None
    for line in text.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else None
        assert cells is None or width is None or cells == width, line
        width = cells


def test_results_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind 'something'"):
        write_report({"kind": "something"}, tmp_path)
