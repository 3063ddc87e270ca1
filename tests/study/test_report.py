"""What a report says: the figures of its results, what may be concluded from them, and what may
not.
"""

from __future__ import annotations

import re
from itertools import combinations
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
    pairs = [(name, "diff_v1 poly_norm") for name in others]
    # Head ratios are compared with each other too.
    pairs += combinations([f"gda {ratio}:1 poly_norm" for ratio in (2, 4, 7)], 2)
    p = sorted(stats.ttest_rel(losses(results, a), losses(results, b)).pvalue for a, b in pairs)
    smallest = min(c.p_holm for c in Study(results).comparisons)
    assert smallest == pytest.approx(p[0] * len(p))
    assert f"p (Holm): corrected over all {len(p)} comparisons" in text
    assert "two-sided paired t test" in text
    assert "Holm" in page
    two, four = (losses(results, f"gda {ratio}:1 poly_norm") for ratio in (2, 4))
    row = next(line for line in text.splitlines() if line.startswith("| GDA 4:1 less 2:1 "))
    assert f"−{np.mean(two) - np.mean(four):.4f}" in row


def test_a_comparison_read_backwards_has_the_other_sign_and_the_same_p() -> None:
    study = Study(made_up_results())
    by_label = {v.label: v for v in study.variants}
    four, one = by_label["GDA 4:1"], by_label["DIFF V1"]
    there, back = study.compared(four, one), study.compared(one, four)
    assert (there.mean, there.p_holm, there.shared_p_holm) == (-back.mean, back.p_holm, back.shared_p_holm)
    assert (there.paired.difference.lower, there.shared[0].lower) == (
        -back.paired.difference.upper,
        -back.shared[0].upper,
    )
    assert study.compared(by_label["softmax GQA"], four) is None


def test_a_study_of_pure_noise_is_said_to_show_nothing(tmp_path: Path) -> None:
    results = made_up_results()
    rng = np.random.default_rng(0)
    for run in results["runs"]:
        run["validation_loss"] = 2.6 + 0.01 * rng.standard_normal()
    _, text = report(results, tmp_path)
    assert "no difference from DIFF V1 is beyond what seeds explain" in text.replace("No", "no")
    assert text.split("\n\n")[1].startswith("No head ratio is shown to be best.")


def test_failed_and_missing_runs_are_named_with_their_reason_and_count_nowhere(tmp_path: Path) -> None:
    results = made_up_results(failed=(("gda 2:1 poly_norm", 1), ("gda 2:1 poly_norm", 2), ("diff_v2 poly_norm", 0)))
    page, text = report(results, tmp_path)
    assert (
        "| GDA 2:1 | 1 | failed | the loss was not finite for 20 steps in a row \\| \\<stopped> at step 130 |" in text
    )
    assert "&lt;stopped&gt;" in page
    assert "<stopped>" not in page
    only = losses(results, "gda 2:1 poly_norm")
    assert f"| GDA 2:1 | {only[0]:.4f} |" in text  # one seed: no interval
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
    assert "Two seeds that finished for both variants are the fewest that give an interval or a test." in text
    assert "One seed in common allows no test of its own." in text
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
    # For each size: one family of six against the reference and three between the other ratios, of
    # either activation, and of seven between activations.
    assert len(study.comparisons) == 2 * (2 * (6 + 3) + 7)
    _, text = report(results, tmp_path)
    assert "GDA 4:1, SwiGLU, 8m" in text


def test_a_variant_without_others_of_its_feed_forward_is_no_winner_and_drawn_with_the_rest(tmp_path: Path) -> None:
    results = made_up_results(activations=("poly_norm", "silu"))
    for part in ("variants", "runs"):
        name = "name" if part == "variants" else "variant"
        results[part] = [r for r in results[part] if "silu" not in r[name] or r[name] == "softmax gqa silu"]
    study = Study(results)
    ((_, panel),) = study.panels()
    assert [study.label_in(panel, v) for v in panel][-2:] == ["DIFF V2", "softmax GQA SwiGLU"]
    page, text = report(results, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith(("| softmax GQA, SwiGLU", "| **softmax GQA, SwiGLU"))]
    assert rows
    assert not any("**" in row or "reference" in row for row in rows)
    assert "GDA 4:1, PolyNorm" not in text
    assert "Under softmax GQA, PolyNorm's mean loss is" in text
    assert "no difference could be tested" not in text
    assert ">softmax GQA SwiGLU</text>" in page


def test_variants_stand_in_the_order_of_their_ratios_whatever_the_grids(tmp_path: Path) -> None:
    results = made_up_results()
    results["variants"].reverse()
    labels = [v.label for v in Study(results).variants]
    assert labels[2:] == ["DIFF V1", "GDA 2:1", "GDA 4:1", "GDA 7:1", "DIFF V2"]
    assert {"softmax MHA", "softmax GQA"} == set(labels[:2])


def test_a_difference_over_tokens_is_between_the_same_seeds(tmp_path: Path) -> None:
    """A seed that only one of both finished would move the curve by what seeds do, ten times what
    variants do.
    """
    results = made_up_results()
    for run in results["runs"]:
        for row in run["validation"]:
            row[2] += run["seed"]
    whole, _ = report(results, tmp_path / "whole")
    results["runs"] = [r for r in results["runs"] if (r["variant"], r["seed"]) != ("gda 4:1 poly_norm", 2)]
    page, _ = report(results, tmp_path / "cut")
    title = "Validation loss less that of DIFF V1, over tokens"
    ends = [re.search(rf"{title}[^;]*;[^<]*GDA 4:1 (−?[\d.]+)", content).group(1) for content in (whole, page)]
    assert abs(float(ends[1].replace("−", "-"))) < 0.1
    assert abs(float(ends[0].replace("−", "-"))) < 0.1


def test_learning_rates_that_were_tried_stand_beside_the_one_taken(tmp_path: Path) -> None:
    results = made_up_results()
    name = "gda 4:1 poly_norm"
    results["sweep"] = [
        {"variant": name, "size": "2m", "seed": 0, "learning_rate": rate, "status": status, "validation_loss": loss}
        for rate, loss, status in ((0.002, 4.25, "finished"), (0.004, 4.125, "finished"), (0.008, None, "failed"))
    ]
    next(v for v in results["variants"] if v["name"] == name).update(learning_rate=0.004, learning_rate_from="swept")
    _, text = report(results, tmp_path)
    assert "| GDA 4:1 | 4.2500 | 4.1250 | failed | 0.004 | swept |" in text
    assert "| GDA 2:1 | – | – | – | 0.003 | given |" in text


def test_folders_of_a_machine_are_left_out_of_its_errors(tmp_path: Path) -> None:
    results = made_up_results(failed=(("gda 2:1 poly_norm", 1),))
    message = "FileNotFoundError: /home/someone/data/train.arrow is missing; see https://example.org/a/b and runs/x/log"
    next(r for r in results["runs"] if r["status"] == "failed")["error"] = message
    page, text = report(results, tmp_path)
    for content in (page, text):
        assert "…/train.arrow is missing; see https://example.org/a/b and runs/x/log" in content
        assert "/home/someone" not in content


def test_the_markdown_has_the_answer_the_table_the_limits_and_the_pages_address_and_no_drawings(tmp_path: Path) -> None:
    page, text = report(made_up_results(), tmp_path)
    lead = text.split("\n\n")[1]
    assert "lowest mean validation loss of 4 head ratios" in lead
    assert f'<p class="lead">{lead}</p>'.replace("<0", "&lt;0").replace("< 0", "&lt; 0") in page
    assert text.index("[report.html](report.html)") < text.index("## Limits") < text.index("| **GDA 4:1** |")
    assert "Loss curves" not in text
    assert ">Loss curves</h2>" in page
    assert "Picture" not in text


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
