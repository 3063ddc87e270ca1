"""What a checkpoint says of its tensors: the same under every layout of ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import on_ranks
from helpers.layouts import STEPS, Case, train_cases
from helpers.tiny import MOTIF_3, prepare_text
from motifarch.checkpoint_reader import CheckpointReader
from motifarch.ledger.merkle import leaf_hash, root
from motifarch.ledger.tensor_hash import whole_hash
from motifarch.parallel import Layout
from motifarch.train.manifest import find_newest, read_manifest
from motifarch.train.saved_hashes import HASHES, roots

MODELS: dict[str, dict[str, Any]] = {
    "gda": {"variant": "gda", "optimizer": "muon"},
    "motif_3": {"variant": "diff_v1", "model": MOTIF_3},
}
LAYOUTS = {
    2: [Layout(), Layout(tensor=2), Layout(replicate=2)],
    4: [Layout(), Layout(tensor=2), Layout(replicate=2), Layout(tensor=4), Layout(context=2)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=MODELS)
def saved(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A checkpoint of one process."""
    folder = tmp_path_factory.mktemp("saved")
    case = Case("one", layout=Layout(), save=folder / "run", **MODELS[request.param])
    on_ranks(1, train_cases, data, folder / "one.pt", [case])
    checkpoint = find_newest(folder / "run")
    assert checkpoint is not None
    return request.param, checkpoint


def test_they_are_those_of_the_whole_tensors(saved: tuple[str, Path]) -> None:
    _, checkpoint = saved
    hashes = json.loads((checkpoint / HASHES).read_text())
    tensors = {}
    for name, about in CheckpointReader(checkpoint).tensors.items():
        tensors[name] = torch.empty(about.size, dtype=about.properties.dtype)
    CheckpointReader(checkpoint).load(tensors, no_dist=True)
    assert {name: whole_hash(tensor).hex() for name, tensor in tensors.items()} == hashes
    assert read_manifest(checkpoint)["step"] == STEPS // 2
    weights = {name.removeprefix("model."): bytes.fromhex(h) for name, h in hashes.items() if name[:6] == "model."}
    assert (
        roots(hashes)["weights"]
        == root([leaf_hash(name.encode() + b"\0" + own) for name, own in sorted(weights.items())]).hex()
    )


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_layout_of_ranks_gives_the_same(ranks: int, saved: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    kind, checkpoint = saved
    # Motif-3's heads allow no more than two ranks of tensor parallelism.
    layouts = [layout for layout in LAYOUTS[ranks] if kind == "gda" or layout.tensor < 4]
    cases = [
        Case(str(i), layout=layout, load=checkpoint, save=tmp_path / str(i), steps=0, **MODELS[kind])
        for i, layout in enumerate(layouts)
    ]
    on_ranks(ranks, train_cases, data, tmp_path / "several.pt", cases)
    expected = json.loads((checkpoint / HASHES).read_text())
    for case, layout in zip(cases, layouts, strict=True):
        assert case.save is not None
        again = find_newest(case.save)
        assert again is not None
        assert json.loads((again / HASHES).read_text()) == expected, layout
