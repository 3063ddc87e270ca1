"""Training under every layout of ranks, with one process as the truth."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.layouts import STEPS, VARIANTS, Case, assert_routed_alike, assert_same, train_cases
from helpers.tiny import MOTIF_3
from motifarch.parallel import Layout

LAYOUTS = {
    2: {"fsdp": Layout(), "tensor 2": Layout(tensor=2), "context 2": Layout(context=2)},
    4: {
        "hsdp 2x2": Layout(replicate=2),
        "tensor 2 x fsdp 2": Layout(tensor=2),
        "context 2 x fsdp 2": Layout(context=2),
        "tensor 2 x context 2": Layout(tensor=2, context=2),
    },
}
# Muon, with logits that grow past QK-clip's bound on the way.
MUON: dict[str, Any] = {"variant": "gda window", "optimizer": "muon", "qk_clip": 0.5}
# Data parallelism does not know what attention is: one variant will do. Two ranks have shown the
# rest.
_FEW = {"fsdp": ["gda"], "hsdp 2x2": ["gda"]} | {name: ["gda", "diff_v2 gated"] for name in LAYOUTS[4] if " x " in name}


def cases(ranks: int) -> list[Case]:
    adamw = [
        Case(f"{variant}, {name}", variant, layout)
        for name, layout in LAYOUTS[ranks].items()
        for variant in _FEW.get(name, VARIANTS)
    ]
    return adamw + [Case(f"muon, {name}", layout=layout, **MUON) for name, layout in LAYOUTS[ranks].items()]


@pytest.fixture(scope="module")
def truth(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each variant on one process."""
    output = tmp_path_factory.mktemp("layouts") / "one.pt"
    alone = [Case(v, v, Layout()) for v in VARIANTS] + [Case("muon", layout=Layout(), **MUON)]
    on_ranks(1, train_cases, data, output, alone)
    return torch.load(output)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of a number of ranks, in one process group."""
    output = tmp_path_factory.mktemp("layouts") / "several.pt"
    on_ranks(request.param, train_cases, data, output, cases(request.param))
    return torch.load(output)  # type: ignore[no-any-return]


# Micro-batches, biases that move, logits past QK-clip's bound. A first layer's streams are copies,
# so the gradients of its hyper-connections have rank one but for rounding, which Muon scales up.
MOTIF_3_CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "options": {"activation_checkpointing": "selective"}},
    "muon": {"optimizer": "muon", "qk_clip": 0.5, "lr": 1e-3, "micro": 1},
}


# Four ranks share them.
EXPERTS_OF_FOUR = {"num_experts": 8}


def motif_3(name: str, layout: Layout) -> list[Case]:
    common: dict[str, Any] = {"variant": "gda", "model": MOTIF_3 | {"qk_norm": False} | EXPERTS_OF_FOUR}
    return [Case(f"{which}, {name}", layout=layout, **common, **own) for which, own in MOTIF_3_CASES.items()]


@pytest.mark.slow
def test_motif_3_is_equal_to_one_process(data: Path, tmp_path: Path) -> None:
    layouts = {
        1: {"alone": Layout()},
        2: {"fsdp": Layout(), "expert 2": Layout(expert=2)},
        4: {
            "fsdp": Layout(),
            "hsdp": Layout(replicate=2),
            "expert 4": Layout(expert=4),
            "expert 2 x fsdp 2": Layout(expert=2),
            "expert 2 x hsdp 2": Layout(replicate=2, expert=2),
            "expert 2 x context 2": Layout(context=2, expert=2),
            "expert 2 x tensor 2": Layout(tensor=2, expert=2),
        },
    }
    found = {}
    for ranks, named in layouts.items():
        on_ranks(ranks, train_cases, data, tmp_path / "out.pt", [c for n, x in named.items() for c in motif_3(n, x)])
        found[ranks] = torch.load(tmp_path / "out.pt")
    truth = {name.split(",")[0]: result for name, result in found.pop(1).items()}
    for result in truth.values():
        moved = [value for name, value in result[2].items() if name.endswith("expert_bias")]
        assert len(moved) == 2
        assert all(bias.any() for bias in moved)
    for ranks, results in found.items():
        for name, result in results.items():
            expected, where = truth[name.split(",")[0]], f"{ranks} ranks, {name}"
            assert_same(result, expected, where)
            assert_routed_alike(result, expected, where)


def test_experts_of_two_ranks_are_equal_to_one_process(data: Path, tmp_path: Path) -> None:
    found = {}
    for ranks, layout in ((1, Layout()), (2, Layout(expert=2))):
        case = Case("", "gda", layout, "muon", model=MOTIF_3 | {"qk_norm": False}, qk_clip=0.5, steps=4)
        on_ranks(ranks, train_cases, data, tmp_path / "out.pt", [case])
        found[ranks] = torch.load(tmp_path / "out.pt")[""]
    assert_same(found[2], found[1], "expert 2")
    assert_routed_alike(found[2], found[1], "expert 2")


def test_equal_to_one_process(trained: dict[str, Any], truth: dict[str, Any]) -> None:
    for name, found in trained.items():
        assert len(found[0]) == STEPS
        assert_same(found, truth[name.split(",")[0]], name)
