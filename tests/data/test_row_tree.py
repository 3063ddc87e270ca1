"""The Merkle root over prepared rows, and the proof of one row."""

import json
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from pymerkle import InmemoryTree

from helpers.tiny import prepare_conversations, prepare_text
from motifarch.cli import run as command_line
from motifarch.data import PackedDataset
from motifarch.data.loss_mask import with_mask
from motifarch.data.manifest import Manifest
from motifarch.data.row_tree import prove, proves
from motifarch.errors import UserError


def theirs(folder: Path, split: str) -> str:
    """The root by pymerkle."""
    tree: Any = InmemoryTree(algorithm="sha256")
    for block in PackedDataset.open(folder, split):
        ids = block.input_ids if block.loss_mask is None else with_mask(block.input_ids, block.loss_mask)
        tree.append_entry(blake3(ids.astype("<i4").tobytes() + block.doc_lengths.astype("<i4").tobytes()).digest())
    return str(tree.get_state().hex())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_text(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_root_is_that_of_the_rows(data: Path, split: str) -> None:
    assert Manifest.read(data).splits[split].rows_root == theirs(data, split)


def test_rows_with_a_loss_mask_have_one_too(data: Path, tmp_path: Path) -> None:
    chats = prepare_conversations(tmp_path, data / "tokenizer")
    assert Manifest.read(chats).splits["train"].rows_root == theirs(chats, "train")
    proof = prove(chats, "train", 1)
    assert proves(proof, theirs(chats, "train"))


def test_merged_shards_have_the_root_of_their_rows(data: Path, tmp_path: Path) -> None:
    shards = [tmp_path / "1", tmp_path / "2"]
    source = f"files:{data.parent}/source0/*.txt"
    for i, shard in enumerate(shards, 1):
        options = ["--tokenizer", str(data / "tokenizer"), "--seq-len", "32", "--validation-fraction", "0.3"]
        words = ["data", "prepare", "--source", source, "--shard", f"{i}/2", "--num-proc", "1", "--output", str(shard)]
        assert command_line([*words, *options]) == 0
    assert command_line(["data", "merge", *map(str, shards), "--output", str(tmp_path / "all")]) == 0
    for split in ("train", "validation"):
        assert Manifest.read(tmp_path / "all").splits[split].rows_root == theirs(tmp_path / "all", split)


def test_a_row_is_shown_to_be_there_and_no_other(data: Path) -> None:
    root = theirs(data, "train")
    rows = len(PackedDataset.open(data, "train"))
    for row in {0, 1, rows // 2, rows - 1}:
        proof = json.loads(json.dumps(prove(data, "train", row)))
        assert proves(proof, root)
        assert proof["input_ids"] == PackedDataset.open(data, "train")[row].input_ids.tolist()
        assert not proves(proof | {"row": (row + 1) % rows}, root)
        assert not proves(proof | {"input_ids": [*proof["input_ids"][:-1], 7]}, root)
        assert not proves(proof | {"doc_lengths": [1, *proof["doc_lengths"]]}, root)
        assert not proves(proof, theirs(data, "validation"))


@pytest.mark.parametrize("damaged", [{}, [], None, {"row": "a"}, {"input_ids": [2**40], "doc_lengths": [1]}])
def test_what_is_no_proof_proves_nothing(data: Path, damaged: Any) -> None:
    assert not proves(damaged, theirs(data, "train"))


def test_a_row_that_is_not_there_is_named(data: Path) -> None:
    with pytest.raises(UserError, match="rows are 0 to"):
        prove(data, "train", 10**6)
