"""Training under every layout of ranks, with one process as the truth."""

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.layouts import MUON_AND_STREAMS, STEPS, VARIANTS, Case, assert_routed_alike, assert_same, train_cases
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


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.nightly)])
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases of a number of ranks, in one process group."""
    output = tmp_path_factory.mktemp("layouts") / "several.pt"
    on_ranks(request.param, train_cases, data, output, cases(request.param))
    return torch.load(output)  # type: ignore[no-any-return]


# Micro-batches, biases that move, logits past QK-clip's bound.
MOTIF_3_CASES: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "options": {"activation_checkpointing": "selective"}, "micro": 3},
    "muon": MUON_AND_STREAMS | {"qk_clip": 0.5, "micro": 1},
}


# Four ranks share them.
EXPERTS_OF_FOUR = {"num_experts": 8}


def motif_3(name: str, layout: Layout) -> list[Case]:
    common: dict[str, Any] = {"variant": "gda", "model": MOTIF_3 | {"qk_norm": False} | EXPERTS_OF_FOUR}
    return [Case(f"{which}, {name}", layout=layout, **common, **own) for which, own in MOTIF_3_CASES.items()]


@pytest.mark.nightly
def test_motif_3_is_equal_to_one_process(data: Path, tmp_path: Path) -> None:
    layouts = {
        1: {"alone": Layout()},
        2: {"fsdp": Layout(), "expert 2": Layout(expert=2), "context 2": Layout(context=2)},
        4: {
            "fsdp": Layout(),
            "hsdp": Layout(replicate=2),
            "expert 4": Layout(expert=4),
            "expert 2 x fsdp 2": Layout(expert=2),
            "expert 2 x hsdp 2": Layout(replicate=2, expert=2),
            "expert 2 x context 2": Layout(context=2, expert=2),
            "expert 2 x tensor 2": Layout(tensor=2, expert=2),
            "context 2 x fsdp 2": Layout(context=2),
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


def test_motif_3_on_two_ranks_is_equal_to_one_process(data: Path, tmp_path: Path) -> None:
    found = {}
    for ranks, layouts in ((1, [Layout()]), (2, [Layout(expert=2), Layout(context=2)])):
        common: dict[str, Any] = {"variant": "gda", "model": MOTIF_3 | {"qk_norm": False}, "steps": 4}
        # Of three rows, the second lies on both ranks of context parallelism.
        common |= {"optimizer": "muon", "qk_clip": 0.5, "micro": 3}
        cases = [Case(str(layout), layout=layout, **common) for layout in layouts]
        on_ranks(ranks, train_cases, data, tmp_path / "out.pt", cases)
        found[ranks] = torch.load(tmp_path / "out.pt")
    (truth,) = found[1].values()
    for name, result in found[2].items():
        assert_same(result, truth, name)
        assert_routed_alike(result, truth, name)
        if "context=2" in name:  # lambdas are those of the last micro-batch, here the same one
            torch.testing.assert_close(result[4], truth[4], rtol=0, atol=1e-5)


# Of 64 tokens in a row a rank has 16. Heads are as many as four ranks can share.
HEADS = {"num_attention_heads": 12, "num_noise_heads": 4, "num_key_value_heads": 4, "qk_norm": False}
LONG_WINDOWS: dict[str, dict[str, Any]] = {
    "gda": {"variant": "gda window", "model": {"sliding_window": 40}},
    "motif 3": {"variant": "gda", "model": MOTIF_3 | HEADS | {"sliding_window": 24}},
}


@pytest.mark.nightly
@pytest.mark.parametrize("own", [{"optimizer": "adamw"}, MUON_AND_STREAMS | {"qk_clip": 0.5}], ids=["adamw", "muon"])
def test_windows_longer_than_a_ranks_part(own: dict[str, Any], data: Path, tmp_path: Path) -> None:
    found = {}
    for ranks, layouts in ((1, [Layout()]), (4, [Layout(context=4), Layout(tensor=2, context=2)])):
        cases = [Case(f"{n}, {x}", layout=x, **own, **of) for n, of in LONG_WINDOWS.items() for x in layouts]
        on_ranks(ranks, train_cases, data, tmp_path / "out.pt", cases)
        found[ranks] = torch.load(tmp_path / "out.pt")
    truth = {name.split(",")[0]: result for name, result in found[1].items()}
    for name, result in found[4].items():
        expected = truth[name.split(",")[0]]
        assert_same(result, expected, name)
        if name.startswith("motif 3"):
            assert_routed_alike(result, expected, name)


def test_equal_to_one_process(trained: dict[str, Any], truth: dict[str, Any]) -> None:
    for name, found in trained.items():
        assert len(found[0]) == STEPS
        assert_same(found, truth[name.split(",")[0]], name)
