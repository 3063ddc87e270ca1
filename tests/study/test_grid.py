"""Grids: what is read, and what is refused with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.tiny_study import GRID, write_grid
from motifarch.errors import UserError
from motifarch.study.data import describe
from motifarch.study.grid import read_grid
from motifarch.study.main import main
from motifarch.study.matching import match

STUDIES = sorted((Path(__file__).parents[2] / "recipes" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
@pytest.mark.parametrize("by", ["parameters", "flops", "kv_cache"])
def test_our_studies_can_be_matched(path: Path, by: str) -> None:
    grid = read_grid([str(path), "--match", by])
    found = match(grid, describe(grid.data, None))
    smallest = {"short_cpu": 4e5, "tiny_cpu": 2e6, "ratio_cpu": 5e5, "gpu_short": 8e6, "gpu_50m": 50e6}[path.stem]
    assert len(found) == sum(len(grid.compared_at(size)) for size in grid.sizes) >= 3
    assert len(grid.seeds) >= 3
    assert min(m.costs["parameters"] for m in found) >= smallest


def test_any_field_can_be_overridden(tmp_path: Path) -> None:
    path = write_grid(tmp_path, "somewhere")
    grid = read_grid(
        [str(path), "--match", "kv_cache", "--recipe.optim.clip", "2.0", "--seeds", "[4, 5]", "--tokens=9000"]
    )
    assert (grid.match, grid.recipe.optim.clip, grid.seeds, grid.tokens) == ("kv_cache", 2.0, [4, 5], 9000)
    assert grid.recipe.batch.size == GRID["recipe"]["batch"]["size"]


def test_operations_is_a_deprecated_name_of_flops(tmp_path: Path) -> None:
    path = write_grid(tmp_path, "somewhere", match="operations")
    with pytest.warns(FutureWarning, match="match: flops"):
        assert read_grid([str(path)]).match == "flops"
    with pytest.warns(FutureWarning, match="match: flops"):
        assert read_grid([str(path), "--match", "operations"]).match == "flops"


SIZE = GRID["sizes"][0]
DESIGN: dict[str, Any] = {"fixed": "query_heads", "heads": 12, "ratios": [1, 2, 3]}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"variant": []}, r"unknown study field 'variant' in .*; did you mean 'variants'\?"),
    ({"sizes": [SIZE | {"hidden": 3}]}, r"unknown study field 'sizes\[0\].hidden'.*did you mean 'sizes.hidden_size'\?"),
    ({"recipe": {"optim": {"lrr": 3}}}, r"unknown study field 'recipe.optim.lrr'.*did you mean 'recipe.optim.lr'\?"),
    ({"variants": [{"attention": "gdaa"}]}, r"variants\[0\].attention is 'gdaa' .*softmax_mha, softmax_gqa, diff_v1"),
    ({"variants": [{"attention": "gda"}]}, r"variants\[0\].ratio is None"),
    ({"variants": [{"attention": "diff_v1", "ratio": 2}]}, r"variants\[0\].ratio is 2, but diff_v1 has no choice"),
    ({"variants": [{"attention": "diff_v1"}] * 2}, "variants holds diff_v1 poly_norm twice"),
    ({"variants": []}, "variants and designs are empty"),
    (
        {"variants": [{"attention": "diff_v2", "seeds": [9]}]},
        r"variants\[0\].seeds has 9, which is no seed",
    ),
    ({"variants": [{"attention": "diff_v2", "noise_heads": 2}]}, r"variants\[0\].noise_heads is 2, but diff_v2 has no"),
    ({"designs": [DESIGN | {"fixed": "heads"}]}, r"designs\[0\].fixed is 'heads' .*noise_heads, signal_heads"),
    ({"designs": [DESIGN | {"ratios": [2]}]}, r"designs\[0\].ratios is \[2\]; give at least two"),
    ({"designs": [DESIGN | {"ratios": [1, 1]}]}, r"designs\[0\].ratios holds 1 twice"),
    (
        {"designs": [DESIGN | {"ratios": [1, 4]}]},
        r"has 4, and 12 query heads do not divide 4:1; accepted: 1, 2, 3, 5",
    ),
    ({"designs": [DESIGN] * 2}, "designs holds 12 query heads twice"),
    (
        {"reference": "gda 9:1 silu"},
        "reference is 'gda 9:1 silu', which is no variant; accepted: softmax gqa poly_norm",
    ),
    ({"seeds": [1, 1]}, "seeds holds 1 twice"),
    ({"seeds": [-1]}, r"seeds\[0\] is -1"),
    ({"tokens": 0}, "tokens is 0"),
    ({"sizes": [{k: v for k, v in SIZE.items() if k != "head_dim"}]}, r"sizes\[0\].head_dim is missing"),
    ({"sizes": [SIZE | {"name": "../up"}]}, r"sizes\[0\].name is '../up'"),
    ({"sizes": [SIZE | {"num_hidden_layers": 0}]}, r"sizes\[0\].num_hidden_layers is 0"),
    ({"learning_rate": {}}, "give one of them"),
    ({"learning_rate": {"given": 1e-3, "sweep": [1e-3, 2e-3]}}, "give one of them"),
    ({"learning_rate": {"sweep": [1e-3]}}, "at least two rates"),
    ({"learning_rate": {"given": -1.0}}, "learning_rate.given is -1"),
    ({"recipe": {"optim": {"lr": 1e-3}}}, "recipe.optim.lr is 0.001, but the study decides it"),
    ({"recipe": {"model": {"hidden_size": 48}}}, "recipe.model.hidden_size is 48, but the study decides it"),
    ({"recipe": {"validation": {"every": 0}}}, "recipe.validation.every is 0"),
    ({"recipe": {"batch": {"size": 0}}}, "batch.size is 0"),
    ({"measure": {"repeats": 0}}, "repeats is 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid([str(write_grid(tmp_path, "somewhere", **changes))])


def test_a_dry_run_prints_the_matched_variants_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_grid(tmp_path, "")
    data = {"path": str(tmp_path / "data"), "source": ["stdlib"], "seq_len": 32, "vocab_size": 300}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"data": data}))
    assert main([str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "equal parameters, to 1% of softmax gqa poly_norm" in printed
    assert "gda 2:1 poly_norm" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml"]
