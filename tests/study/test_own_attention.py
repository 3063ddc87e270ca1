"""A study in which one variant's attention is the user's own, from its grid to its report."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import prepare_text
from helpers.tiny_study import GRID, write_grid
from motifarch.errors import UserError
from motifarch.study.grid import read_grid
from motifarch.study.main import main

GATED, LINEAR = "examples.gated_softmax:GatedSoftmax", "models.test_own_attention:LinearAttention"
FUNCTION = "models.test_own_attention:llamas"


@pytest.mark.nightly
def test_it_is_matched_trained_measured_and_reported_like_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).parent.parent)  # where the processes that train find LINEAR
    monkeypatch.setenv("PYTHONPATH", tests, prepend=os.pathsep)
    data, out = prepare_text(tmp_path), tmp_path / "out"
    variants = [{"attention": a} for a in ("softmax_gqa", GATED, FUNCTION, LINEAR)]
    grid = write_grid(tmp_path, data, variants=variants)
    assert main([str(grid), "--output", str(out), "--threads", "1"]) == 0
    found = json.loads((out / "results.json").read_text())
    rows, runs = ({row[key]: row for row in found[kind]} for kind, key in (("variants", "name"), ("runs", "variant")))
    softmax, gated, function, linear = (
        rows[f"{n} poly_norm"] for n in ("softmax gqa", "GatedSoftmax", "llamas", "LinearAttention")
    )
    assert gated["parameters"] == pytest.approx(softmax["parameters"], rel=0.01)
    assert (
        gated["model"]["intermediate_size"]
        < softmax["model"]["intermediate_size"]
        == function["model"]["intermediate_size"]
    )
    assert linear["training_flops_per_token"] != softmax["training_flops_per_token"]
    losses = {name: run["validation_loss"] for name, run in runs.items()}
    # The same function from the same weights, in another order of sums.
    assert losses["llamas poly_norm"] == pytest.approx(losses["softmax gqa poly_norm"], rel=1e-4)
    assert losses["GatedSoftmax poly_norm"] != losses["softmax gqa poly_norm"]
    for name in ("GatedSoftmax", "llamas"):
        assert {"probe", "attention", "speed"} <= runs[f"{name} poly_norm"].keys()
    entropies = {name: run["attention"]["layers"][0]["entropy"] for name, run in runs.items()}
    assert entropies["GatedSoftmax poly_norm"] > 0
    assert entropies["llamas poly_norm"] is entropies["LinearAttention poly_norm"] is None
    assert "GatedSoftmax" in (out / "report.md").read_text()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"attention": "no_such_module:Attention"}, r"no_such_module:Attention.*can't be imported"),
    ({"attention": "torch.nn:Linear"}, r"not derived from motifarch\.layers\.BaseAttention"),
]


@pytest.mark.parametrize(("variant", "message"), REFUSED)
def test_what_is_no_attention_is_refused_before_anything_runs(
    variant: dict[str, Any], message: str, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path, prepare_text(tmp_path), variants=[*GRID["variants"], variant])
    with pytest.raises(UserError, match=message):
        main([str(grid), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_two_of_the_same_name_are_refused(tmp_path: Path) -> None:
    variants = [{"attention": "a.b:Mine"}, {"attention": "c.d:Mine"}]
    with pytest.raises(UserError, match="variants holds Mine poly_norm twice"):
        read_grid([str(write_grid(tmp_path, "somewhere", variants=variants))])
