"""The shipped recipes of Motif-3's three stages fit the cluster that each is named for."""

import json
from pathlib import Path

import pytest

from motifarch.commands.plan import main

RECIPES = Path(__file__).parents[2] / "recipes" / "motif_3"
STAGES = {"": 4096, "_long_32k": 32768, "_long_256k": 262144}


@pytest.mark.nightly
@pytest.mark.parametrize("gpus", [64, 768])  # 256 have the shards of 768, in a third of the copies
def test_the_three_stages_fit(gpus: int, tmp_path: Path) -> None:
    recipes = [str(RECIPES / f"b200_{gpus}{stage}.yaml") for stage in STAGES]
    lengths = ",".join(map(str, STAGES.values()))
    output = tmp_path / "plan"
    assert main([*recipes, "--gpus", str(gpus), "--gpu", "b200", "--seq-len", lengths, "--output", str(output)]) == 0
    found = json.loads((output / "plan.json").read_text())
    assert [stage["fits"] for stage in found["stages"]] == [True] * 3
    assert [stage["seq_len"] for stage in found["stages"]] == list(STAGES.values())
    assert found["together"]["tokens"] == pytest.approx(12.5e12, rel=1e-3)
    for stage in found["stages"]:
        assert stage["parameter_count"] == 314_841_775_750 - 51 * 384  # biases of experts are buffers here
        assert stage["recipe"]["precision"]["matmul"] == "mxfp8"
    assert (output / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_cut_model_fits_a_node(tmp_path: Path) -> None:
    command = [str(RECIPES / "h100_8.yaml"), "--gpus", "8", "--gpu", "h100", "--seq-len", "4096", "--no-suggestions"]
    assert main([*command, "--json", str(tmp_path / "plan.json")]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["fits"]
