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
    frame = table(results, [v.name for v in designs.variants])
    plane = smf.ols("loss ~ signal + noise + C(seed)", frame).fit()
    for slope, name in ((both.signal, "signal"), (both.noise, "noise")):
        assert (slope.mean, slope.p) == pytest.approx((plane.params[name], plane.pvalues[name]))
    # The same plane over other coordinates: along one the ratio stays.
    turned = smf.ols("loss ~ ratio + heads + C(seed)", frame).fit()
    low, high = turned.conf_int().loc["heads"]
    assert (both.both.mean, both.both.half) == pytest.approx((turned.params["heads"], (high - low) / 2))


CONCLUSIONS = [
    # What heads do, in nats for a doubling of signal and noise heads, and what is said first.
    ((-0.03, 0.03), "A higher head ratio lowers the loss in every design", "The ratio alone would explain both"),
    ((0.03, -0.03), "A higher head ratio raises the loss in every design", "The ratio alone would explain both"),
    ((-0.03, -0.03), "The designs disagree", "It is not the ratio alone that counts"),
    ((-0.03, 0.0), "Not every design tells head ratios apart", "The number of signal heads alone would explain both"),
    ((0.0, -0.03), "Not every design tells head ratios apart", "The number of noise heads alone would explain both"),
    ((0.0, 0.0), "No rise or fall of the loss with the head ratio is seen in any design", "Neither is told from 0"),
]


@pytest.mark.parametrize(("truth", "first", "then"), CONCLUSIONS, ids=[then for *_, then in CONCLUSIONS])
def test_the_pages_first_sentence_is_the_datas(truth: tuple[float, float], first: str, then: str) -> None:
    results = made_up_designs(*truth, scatter=0.001)
    said = " ".join(to_markdown(results).split("\n", 2)[2].split())
    assert said.startswith(f"**{first}")
    assert then in said
    assert "<h1>Which head ratio is best?</h1>" in to_html(results)


def test_a_conclusion_names_how_many_designs_it_rests_on() -> None:
    results = made_up_designs(-0.03, 0.03, scatter=0.001)
    alone = {name for row in results["designs"][1:] for name in row["variants"]}
    kept = set(results["designs"][0]["variants"])
    for run in results["runs"]:
        run["status"] = "missing" if run["variant"] in alone - kept else run["status"]
    assert "lowers the loss in the 1 of 3 designs that have runs of two seeds" in " ".join(to_markdown(results).split())


def test_losses_that_no_line_describes_are_said_to_be_off_it() -> None:
    results = made_up_designs(-0.03, 0.03, scatter=0.0005)
    last = results["designs"][0]["variants"][-1]
    for run in results["runs"]:
        run["validation_loss"] -= 0.3 * (run["variant"] == last)
    assert "not on a line" in to_markdown(results)


def test_a_variant_with_fewer_seeds_is_not_the_best_and_decides_no_other() -> None:
    results = made_up_designs(0.0, 0.0, scatter=0.001)
    lucky, best = (results["designs"][0]["variants"][i] for i in (0, 1))
    tried = "gda 1:1 (2+2) silu"
    copied = next(v for v in results["variants"] if v["name"] == lucky)
    results["variants"].append(copied | {"name": tried, "activation": "silu"})
    run = next(r for r in results["runs"] if (r["variant"], r["seed"]) == (lucky, 0))
    results["runs"].append(run | {"variant": tried, "validation_loss": 0.5})
    for run in results["runs"]:
        run["validation_loss"] -= {lucky: 0.2 * (run["seed"] == 0), best: 0.1}.get(run["variant"], 0.0)
    study = StudyResults(results)
    found = study.best(study.variants)
    assert found is not None
    assert found.name == best


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
