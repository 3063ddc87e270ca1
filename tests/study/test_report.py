"""Reports: the figures of their results, the committed ones too, and pages that stand alone."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from helpers.made_up_study import made_up_results
from motifarch.commands.report import main
from motifarch.study.report import to_html, to_markdown, write_report

LOSSES = "Validation loss at the end, nats/token"
COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"


def losses(results: dict[str, Any], variant: str, size: str | None = None) -> np.ndarray:
    runs = [r for r in results["runs"] if r["variant"] == variant and r["size"] == (size or r["size"])]
    runs = [r for r in runs if r["status"] == "finished"]
    return np.array([r["validation_loss"] for r in sorted(runs, key=lambda r: r["seed"])])


def tables(text: str) -> dict[str, dict[str, list[str]]]:
    """Caption -> row -> cells, without marks."""
    found: dict[str, dict[str, list[str]]] = {}
    for caption, body in re.findall(r"\*\*([^|\n]*)\*\*\n\n((?:\|.*\n)+)", text):
        rows = [[c.strip(" *") for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body.splitlines()]
        assert len({len(row) for row in rows}) == 1, caption
        found[caption] = {row[0]: row[1:] for row in rows[2:]}
    return found


NOISE_HEADS = {"DIFF V1": "diff_v1 poly_norm", "GDA 4:1": "gda 4:1 poly_norm", "GDA 7:1": "gda 7:1 poly_norm"}
DESIGNS = {f"GDA {ratio}, PolyNorm": f"gda {ratio} poly_norm" for ratio in ("1:1 (1+1)", "4:1 (4+1)", "7:1 (7+1)")}


@pytest.mark.parametrize(
    ("study", "size", "names"),
    [
        ("head_ratio_study_cpu", None, NOISE_HEADS),
        ("head_ratio_study_cpu_operations", None, NOISE_HEADS),
        ("head_ratio_study_designs_cpu", "0.5m", DESIGNS),
    ],
)
def test_committed_reports_are_those_of_their_results(study: str, size: str | None, names: dict[str, str]) -> None:
    """A table's figures against scipy's, of the first of `names` and others against it."""
    results = json.loads((COMMITTED / study / "results.json").read_text())
    text = to_markdown(results)
    assert text == (COMMITTED / study / "report.md").read_text()
    of = f", {size}" if size else ""
    found = tables(text)
    rows = {label.removesuffix(" (reference)"): row for label, row in found[f"{LOSSES}{of}"].items()}
    own = {label + of: losses(results, variant, size) for label, variant in names.items()}
    for label, loss in own.items():
        half = stats.t.ppf(0.975, len(loss) - 1) * stats.sem(loss)
        assert rows[label][0] == f"{loss.mean():.4f} ± {half:.4f}"
    first, *others = own
    for label in others:
        test = stats.ttest_rel(own[label], own[first])
        half = (test.confidence_interval().high - test.confidence_interval().low) / 2
        row = found["Paired differences, nats/token"][f"{label} less {first}"]
        assert row[0] == f"{(own[label] - own[first]).mean():+.4f} ± {half:.4f}".replace("-", "−")
        assert row[3] == ("\\<0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}")


def test_learning_rates_that_were_tried_stand_beside_the_one_taken() -> None:
    results = made_up_results()
    name = "gda 4:1 poly_norm"
    results["sweep"] = [
        {"variant": name, "size": "2m", "seed": 0, "learning_rate": rate, "status": status, "validation_loss": loss}
        for rate, loss, status in ((0.002, 4.25, "finished"), (0.004, 4.125, "finished"), (0.008, None, "failed"))
    ]
    next(v for v in results["variants"] if v["name"] == name).update(learning_rate=0.004, learning_rate_from="swept")
    text = to_markdown(results)
    assert "| GDA 4:1 | 4.2500 | 4.1250 | failed | 0.004 | swept |" in text
    assert "| GDA 2:1 | – | – | – | 0.003 | given |" in text


def test_failed_runs_are_listed_without_the_machines_folders() -> None:
    results = made_up_results(failed=(("gda 2:1 poly_norm", 1), ("gda 2:1 poly_norm", 2)))
    error = "FileNotFoundError: /home/someone/data/train.arrow | <missing>; see https://example.org/a/b and runs/x/log"
    next(r for r in results["runs"] if r["status"] == "failed")["error"] = error
    page, text = to_html(results), to_markdown(results)
    assert "…/train.arrow \\| \\<missing>; see https://example.org/a/b and runs/x/log" in text
    assert "…/train.arrow | &lt;missing&gt;" in page
    assert "/home/someone" not in page + text
    (one,) = losses(results, "gda 2:1 poly_norm")
    assert f"| GDA 2:1 | {one:.4f} |" in text  # one seed: no interval
    assert "2 of 21 did not finish" in text


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seeds": (7,)},
        {"activations": ("poly_norm", "silu"), "sizes": ("2m", "8m")},
        {"failed": tuple((f"{a} poly_norm", s) for a in ("diff_v1", "gda 4:1", "softmax mha") for s in (0, 1, 2))},
        {"seeds": (0,), "failed": tuple((v["name"], 0) for v in made_up_results()["variants"])},
    ],
    ids=["whole", "one seed", "sizes and activations", "variants without runs", "nothing finished"],
)
def test_any_study_has_whole_tables_and_a_page_that_asks_for_nothing_from_elsewhere(options: dict[str, Any]) -> None:
    results = made_up_results(**options)
    text, page = to_markdown(results), to_html(results)
    assert tables(text)
    assert page.rstrip().endswith("</html>")
    assert page == to_html(results)
    assert set(re.findall(r"""(?:https?:)?//[^\s"'<)]+""", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "<script" not in page
    assert not re.search(r"url\((?!#)", page)
    for known in (results["command"], "a made-up processor", "0" * 40, "tokens: 4000000"):
        assert known in text
        assert known in page


@pytest.mark.parametrize("side_by_side", [True, False])
def test_runs_that_lack_a_measurement_are_in_the_page_with_the_rest(side_by_side: bool, tmp_path: Path) -> None:
    results = made_up_results()
    names = [v["name"] for v in results["variants"]]
    lacking = dict(zip(("validation", "curve", "probe", "attention", "speed"), names[1:], strict=False))
    for field, name in lacking.items():
        for run in results["runs"]:
            if run["variant"] == name:
                run[field] = [] if field in ("validation", "curve") else None
    if side_by_side:
        results |= {"step_seconds": {"2m": dict.fromkeys(names, 0.5)}, "micro_batch_tokens": 4096}
    write_report(results, tmp_path)

    assert len(tables((tmp_path / "report.md").read_text())[LOSSES]) == len(names)
    shown = pd.concat(pd.read_csv(path) for path in tmp_path.rglob("by_cost*.csv"))
    assert np.isfinite(shown[["x", "y"]]).all(axis=None)
    # A run's own time is that of its last validation; all have FLOPs and a cache.
    timed = len(names) if side_by_side else len(names) - 1
    assert sorted(shown.groupby("panel").series.nunique()) == [timed, len(names), len(names)]


def test_the_command_writes_the_report_again(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    results.write_text(json.dumps(made_up_results()))
    assert main([str(results), "--output", str(tmp_path / "again")]) == 0
    write_report(made_up_results(), tmp_path)
    for name in ("report.html", "report.md"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / name).read_text()
