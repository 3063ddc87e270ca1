"""What designs say of head ratios: as statsmodels' formulas do, and in the page's first words."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import statsmodels.formula.api as smf

from helpers.made_up_study import DESIGNS, made_up_designs, made_up_results
from motifarch.study.analysis import StudyResults
from motifarch.study.designs import StudyDesigns
from motifarch.study.report import to_html, to_markdown, write_report


def table(results: dict[str, Any], names: list[str]) -> pd.DataFrame:
    heads = {v["name"]: v["model"] for v in results["variants"]}
    rows = []
    for run in results["runs"]:
        if run["variant"] in names:
            noise = heads[run["variant"]]["num_noise_heads"]
            signal = heads[run["variant"]]["num_attention_heads"] - noise
            rows.append((run["variant"], run["seed"], np.log2(signal), np.log2(noise), run["validation_loss"]))
    frame = pd.DataFrame(rows, columns=["variant", "seed", "signal", "noise", "loss"])
    return frame.assign(ratio=frame.signal - frame.noise, heads=(frame.signal + frame.noise) / 2)


def test_slopes_intervals_and_misfit_are_those_of_statsmodels_formulas() -> None:
    results = made_up_designs(of_signal=-0.03, of_noise=0.02, scatter=0.005)
    designs = StudyDesigns(StudyResults(results))
    assert [design.fixed for design in designs.all] == list(DESIGNS)
    for design, row in zip(designs.all, results["designs"], strict=True):
        frame = table(results, row["variants"])
        line = smf.ols("loss ~ ratio + C(seed)", frame).fit()
        assert design.slope is not None
        assert design.slope.mean == pytest.approx(line.params["ratio"])
        low, high = line.conf_int().loc["ratio"]
        assert (
            design.slope.mean - (design.slope.half or 0),
            design.slope.mean + (design.slope.half or 0),
        ) == pytest.approx((low, high))
        assert design.slope.p == pytest.approx(line.pvalues["ratio"])
        misfit = sm.stats.anova_lm(line, smf.ols("loss ~ C(variant) + C(seed)", frame).fit())
        assert design.trend is not None
        assert design.trend.misfit_p == pytest.approx(misfit["Pr(>F)"].iloc[1])
    (both,) = designs.separations
    plane = smf.ols("loss ~ ratio + heads + C(seed)", table(results, [v.name for v in designs.variants])).fit()
    for slope, name in ((both.ratio, "ratio"), (both.heads, "heads")):
        assert (slope.mean, slope.p) == pytest.approx((plane.params[name], plane.pvalues[name]))


CONCLUSIONS = [
    # What heads do, in nats for a doubling of signal and noise heads, and what is said first.
    ({"of_signal": -0.03, "of_noise": 0.03}, "A higher head ratio lowers the loss in every design", "lowers the loss"),
    ({"of_signal": 0.03, "of_noise": -0.03}, "A higher head ratio raises the loss in every design", "raises the loss"),
    ({"of_signal": -0.03, "of_noise": -0.03}, "The designs disagree", "is not told from no effect"),
    ({"of_signal": -0.03, "of_noise": 0.0}, "Not every design tells head ratios apart", "lowers the loss"),
    ({"of_signal": 0.0, "of_noise": 0.0}, "No design tells head ratios apart", "is not told from no effect"),
]


@pytest.mark.parametrize(("truth", "first", "ratio"), CONCLUSIONS, ids=[first for _, first, _ in CONCLUSIONS])
def test_the_pages_first_sentence_is_the_datas(truth: dict[str, float], first: str, ratio: str) -> None:
    text = to_markdown(made_up_designs(**truth, scatter=0.001))
    said = " ".join(text.split("\n", 2)[2].split())
    assert said.startswith(f"**{first}")
    assert f"With the number of heads held, the ratio itself {ratio}" in said
    assert "<h1>Which head ratio is best?</h1>" in to_html(made_up_designs(**truth))


def test_a_single_seed_has_no_answer_and_tables_all_the_same() -> None:
    results = made_up_designs(of_signal=-0.03, of_noise=0.03, seeds=(4,))
    text = to_markdown(results)
    assert "No design has finished runs of two seeds: there is no answer yet." in text
    assert "| 8:1 | 8 | 1 |" in text


def test_a_study_under_way_has_a_page_before_its_designs_have_runs(tmp_path: Path) -> None:
    results = made_up_designs(of_signal=-0.03, of_noise=0.03)
    for run in results["runs"]:
        if run["variant"].startswith("gda") and run["variant"] != "gda 1:1 (2+2) poly_norm":
            run["status"] = "missing"
    write_report(results, tmp_path)
    assert "there is no answer yet" in (tmp_path / "report.md").read_text()
    for run in results["runs"]:
        run["status"] = "missing" if run["variant"].startswith("gda") else run["status"]
    write_report(results, tmp_path)
    assert (tmp_path / "figures" / "by_cost_2m.csv").is_file()


def test_results_without_designs_have_none() -> None:
    assert not StudyDesigns(StudyResults(made_up_results())).all
