"""Shards that several machines prepare, and the one folder that they make."""

from pathlib import Path
from shutil import copytree

import pytest

from motifarch.commands.data_merge import main as merge
from motifarch.data import PackedDataset
from motifarch.data.manifest import Manifest
from motifarch.data.prepare import main as prepare
from motifarch.errors import UserError
from motifarch.tokenizer.loading import load_tokenizer


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path) -> list[str]:
    """Of a preparation of the thirty texts and an empty one."""
    mine = copytree(corpus, tmp_path_factory.mktemp("texts") / "mine")
    (mine / "empty.txt").write_text("")
    source = ["--source", f"files:{mine}/*.txt", "--tokenizer", str(tokenizer_folder)]
    return [*source, "--seq-len", "8", "--num-proc", "1", "--validation-fraction", "0.4"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, options: list[str]) -> list[Path]:
    """The corpus in two shards, and whole."""
    folder = tmp_path_factory.mktemp("shards")
    for number in (1, 2):
        assert prepare([*options, "--shard", f"{number}/2", "--output", str(folder / str(number))]) == 0
    assert prepare([*options, "--output", str(folder / "whole")]) == 0
    return [folder / "1", folder / "2", folder / "whole"]


def titles(folder: Path, split: str) -> set[str]:
    """First lines of the documents that begin in a split's blocks."""
    data, tokenizer = PackedDataset.open(folder, split), load_tokenizer(folder / "tokenizer")
    text = "".join(tokenizer.decode(data[i].input_ids[1 if i else 0 :]) for i in range(len(data)))
    return {line for line in text.replace(tokenizer.eos_token, "\n").splitlines() if line.startswith("document ")}


def test_shards_divide_the_documents_and_keep_the_split(shards: list[Path]) -> None:
    for split in ("train", "validation"):
        first, second, whole = (titles(folder, split) for folder in shards)
        assert all((first, second))
        assert not first & second
        assert first | second == whole


def test_a_merge_adds_up_and_depends_on_no_order(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, whole = map(Manifest.read, shards)
    for name, order in {"a": shards[:2], "b": shards[1::-1]}.items():
        for _ in range(2):  # again finds it
            assert merge([*map(str, order), "--output", str(tmp_path / name)]) == 0
    made = Manifest.read(tmp_path / "a")
    assert made == Manifest.read(tmp_path / "b")
    assert made.skipped == whole.skipped
    assert made.skipped["count"] == 1
    for split, counts in made.splits.items():
        parts = [shard.splits[split] for shard in (first, second)]
        assert (counts.documents, counts.tokens) == (whole.splits[split].documents, whole.splits[split].tokens)
        assert counts.blocks == sum(part.blocks for part in parts)
        assert counts.bytes == whole.splits[split].bytes
        a, b = (PackedDataset.open(tmp_path / name, split) for name in "ab")
        rows = [PackedDataset.open(shard, split) for shard in shards[:2]]
        expected = [data[i].input_ids.tolist() for data in rows for i in range(len(data))]
        assert [a[i].input_ids.tolist() for i in range(len(a))] == expected
        assert [b[i].input_ids.tolist() for i in range(len(b))] == expected


def test_what_is_no_complete_set_is_refused(shards: list[Path], options: list[str], tmp_path: Path) -> None:
    first, _, whole = map(str, shards)
    other = tmp_path / "other"
    assert prepare([*options, "--seed", "1", "--shard", "2/2", "--output", str(other)]) == 0
    output = ["--output", str(tmp_path / "made")]
    for given, problem in {
        (first,): "give all 2",
        (first, first): "give each once",
        (first, whole): "is no shard",
        (first, str(other)): "differ in seed",
    }.items():
        with pytest.raises(UserError, match=problem):
            merge([*given, *output])
    assert not (tmp_path / "made").exists()
    for wrong in ("0/2", "3/2", "2", "a/b"):
        with pytest.raises(UserError, match="--shard"):
            prepare([*options, "--shard", wrong, *output])
