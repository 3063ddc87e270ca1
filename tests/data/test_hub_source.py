import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from motifarch.data.documents import Document, Found, Noticed, ReadOptions, Skipped
from motifarch.data.sources import Source, parse_source
from motifarch.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [{"text": f"text {i}", "body": f"body {i}", "n": i} for i in range(5)] + [
        {"text": "", "body": None, "n": 0}
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "held out", "body": "b", "n": 1}))
    return tmp_path


def parse(path: Path, *, streaming: bool, split: str = "train") -> Source:
    return parse_source(f"hf:{path}", hf_split=split, streaming=streaming)


def read(path: Path, *, streaming: bool, split: str = "train", field: str = "text") -> list[Found]:
    """What is found but for other splits."""
    found = parse(path, streaming=streaming, split=split).documents(ReadOptions(field))
    return [one for one in found if not isinstance(one, Noticed)]


@pytest.mark.parametrize("streaming", [False, True])
def test_local_folder(folder: Path, streaming: bool) -> None:
    expected = [Document(f"{folder}:{i + 1}", f"text {i}") for i in range(5)]
    assert read(folder, streaming=streaming) == [*expected, Skipped(f"{folder}:6", "empty")]


@pytest.mark.parametrize("streaming", [False, True])
def test_split_and_field(folder: Path, streaming: bool) -> None:
    (found,) = read(folder, streaming=streaming, split="test")
    assert found == Document(f"{folder}:1", "held out")
    found = read(folder, streaming=streaming, field="body")[-1]
    assert found == Skipped(f"{folder}:6", "no text")


@pytest.mark.parametrize("streaming", [False, True])
def test_what_does_not_exist_is_named(folder: Path, streaming: bool) -> None:
    with pytest.raises(UserError, match=r"no field 'words': pass --text-field with one of text, body, n"):
        read(folder, streaming=streaming, field="words")
    with pytest.raises(UserError, match=r"cannot load split 'none'.*--hf-split"):
        read(folder, streaming=streaming, split="none")


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_are_named(folder: Path, streaming: bool) -> None:
    (folder / "train.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(UserError, match=rf"hf:{folder}: cannot (load|read) split 'train'"):
        read(folder, streaming=streaming)


def test_state_follows_local_files(folder: Path) -> None:
    before = parse(folder, streaming=False).state()
    assert parse(folder, streaming=True).state() == before
    (folder / "train.jsonl").write_text('{"text": "other"}')
    assert parse(folder, streaming=False).state() != before


@pytest.mark.parametrize("options", [[], ["--streaming"]])
def test_a_hub_out_of_reach_is_one_clear_message(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "motifarch.data.prepare", "--source", "hf:no-owner/no-dataset", *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "data")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --source hf:no-owner/no-dataset: cannot load split 'train'")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": "one"}, {"text": "two"}])
    rows.save_to_disk(tmp_path / "alone")
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "splits")
    for folder in ("alone", "splits"):
        found = read(tmp_path / folder, streaming=False)
        assert [one.text for one in found if isinstance(one, Document)] == ["one", "two"]
    noticed = next(iter(parse(tmp_path / "splits", streaming=False).documents(ReadOptions())))
    assert noticed == Noticed(f"{tmp_path}/splits, test", "split not asked for with --hf-split")
