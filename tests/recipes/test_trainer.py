"""The script for transformers.Trainer: FSDP2 by accelerate on two processes equals one process."""

import json
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from helpers.distributed import torchrun
from helpers.tiny import MOTIF_3, RECIPE, write_recipe

DRIVER = Path(__file__).with_name("trainer_on_cpu.py")
CONFIG = Path(__file__).parents[2] / "recipes" / "trainer" / "fsdp2.yaml"
LENGTH = ("--run.steps", "6", "--log.every", "1")


def accelerate_environment() -> dict[str, str]:
    """What `accelerate launch` sets for its processes, from our configuration; in float32."""
    arguments = ["--config_file", str(CONFIG), "--num_processes", "2", "--mixed_precision", "no", str(DRIVER)]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(parsed)
    return {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}


def train(ranks: int, recipe: Path, result: Path) -> dict[str, Any]:
    done = torchrun(ranks, DRIVER, result, recipe, *LENGTH, "--batch.micro_size", "8" if not ranks else "2")
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("model", [RECIPE["model"], MOTIF_3], ids=["motif_2", "motif_3"])
def test_two_processes_shard_and_agree_with_one(
    model: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, data, model=model)
    alone = train(0, recipe, tmp_path / "alone.json")
    assert not any(alone["sharded"])
    environment = accelerate_environment()
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    both = train(2, recipe, tmp_path / "both.json")
    assert both["sharded"]
    assert all(both["sharded"])
    assert both["layers"] == [True] * model["num_hidden_layers"]
    assert len(both["losses"]) == 6
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert both["losses"][-1] < both["losses"][0] - 0.01
    assert both["biases"] == alone["biases"]
    assert all(any(biases) for biases in both["biases"])
    assert len(both["biases"]) == (2 if "num_experts" in model else 0)
