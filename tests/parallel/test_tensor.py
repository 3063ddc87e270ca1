"""Tensor parallelism of Motif-3, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks, train
from helpers.layouts import MUON_AND_STREAMS, STEPS, Case, assert_routed_alike, assert_same, train_cases
from helpers.tensor_parallel import OMISSIONS, compare
from helpers.tiny import MOTIF_3, SHORT_RUN, write_recipe
from motifarch.parallel import Layout
from motifarch.train.manifest import checkpoint_name, checkpoints_folder
from motifarch.train.run_folder import read_metrics

TENSOR = Layout(tensor=2)
LAYOUTS = {"tensor 2 x fsdp 2": TENSOR, "tensor 2 x context 2": Layout(tensor=2, context=2)}
# Noise heads for two ranks of tensor and two of context parallelism together; words that two ranks
# don't divide.
MODEL = MOTIF_3 | {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 4, "vocab_size": 321}
MODEL |= {"qk_norm": False}
ADAMW: dict[str, Any] = {"optimizer": "adamw"}
CLIPPED = MUON_AND_STREAMS | {"qk_clip": 0.5}


def case(name: str, layout: Layout, own: dict[str, Any], **more: Any) -> Case:
    return Case(name, "gda", layout, model=MODEL, **own | more)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    output = tmp_path_factory.mktemp("tensor") / "differences.pt"
    on_ranks(2, compare, output)
    return torch.load(output)  # type: ignore[no-any-return]


def test_loss_and_gradients_are_those_of_one_process(differences: dict[str, dict[str, float]]) -> None:
    assert len(differences["nothing"]) > 100
    assert max(differences["nothing"].values()) < 1e-12, differences["nothing"]


@pytest.mark.parametrize("omission", OMISSIONS)
def test_every_sum_over_the_ranks_is_needed(differences: dict[str, dict[str, float]], omission: str) -> None:
    assert max(differences[omission].values()) > 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensor")


def step(folder: Path) -> Path:
    """Where a run leaves its checkpoint."""
    return checkpoints_folder(folder) / checkpoint_name(STEPS // 2)


@pytest.fixture(scope="module")
def one(data: Path, folder: Path) -> dict[str, Any]:
    """What one process makes of it."""
    cases = [case("adamw", Layout(), ADAMW), case("muon", Layout(), CLIPPED, save=folder / "one")]
    cases.append(case("not clipped", Layout(), MUON_AND_STREAMS))
    on_ranks(1, train_cases, data, folder / "one.pt", cases)
    return torch.load(folder / "one.pt")  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two(data: Path, folder: Path, one: dict[str, Any]) -> dict[str, Any]:
    cases = [
        case("adamw", TENSOR, ADAMW, options={"activation_checkpointing": "selective"}),
        case("muon", TENSOR, CLIPPED, save=folder / "two"),
        case("resumed", TENSOR, CLIPPED, load=step(folder / "one")),
    ]
    on_ranks(2, train_cases, data, folder / "two.pt", cases)
    return torch.load(folder / "two.pt")  # type: ignore[no-any-return]


@pytest.mark.slow
def test_two_ranks_are_equal_to_one_process(one: dict[str, Any], two: dict[str, Any]) -> None:
    biases = {name: bias for name, bias in one["muon"][2].items() if name.endswith("expert_bias")}
    assert len(biases) == 2
    assert all(bias.any() for bias in biases.values())
    name = "model.layers.1.self_attn.wkv_b.weight"
    assert not torch.equal(one["muon"][2][name], one["not clipped"][2][name])
    for optimizer in ("adamw", "muon"):
        assert len(two[optimizer][0]) == STEPS
        assert_same(two[optimizer], one[optimizer], optimizer)
        assert_routed_alike(two[optimizer], one[optimizer], optimizer)


@pytest.mark.nightly
@pytest.mark.parametrize("name", LAYOUTS)
def test_four_ranks_are_equal_to_one_process(data: Path, one: dict[str, Any], tmp_path: Path, name: str) -> None:
    cases = [case("adamw", LAYOUTS[name], ADAMW), case("muon", LAYOUTS[name], CLIPPED)]
    on_ranks(4, train_cases, data, tmp_path / "four.pt", cases)
    for optimizer, found in torch.load(tmp_path / "four.pt").items():
        assert_same(found, one[optimizer], f"{optimizer}, {name}")
        assert_routed_alike(found, one[optimizer], f"{optimizer}, {name}")


@pytest.mark.slow
def test_a_checkpoint_resumes_with_and_without(
    data: Path, folder: Path, one: dict[str, Any], two: dict[str, Any]
) -> None:
    on_ranks(1, train_cases, data, folder / "again.pt", [case("", Layout(), CLIPPED, load=step(folder / "two"))])
    history, *rest = one["muon"]
    for name, found in {"of one process": two["resumed"], "of two": torch.load(folder / "again.pt")[""]}.items():
        assert_same(found, (history[STEPS // 2 :], *rest), name)


@pytest.mark.slow
def test_ranks_with_the_same_tokens_draw_the_same_noise(data: Path, tmp_path: Path) -> None:
    losses = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        recipe = write_recipe(folder, data, model=MOTIF_3, experts={"router_noise": 0.5})
        train(ranks, folder, recipe, *SHORT_RUN, "--parallel.tensor", str(ranks), "--log.every", "1")
        losses.append([row["loss"] for row in read_metrics(folder / "run/metrics.jsonl")])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
