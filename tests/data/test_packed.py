import json
import os
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest

from motifarch.data import PackedDataset, check_same_seq_len, check_same_tokenizer
from motifarch.data.prepare import main
from motifarch.errors import UserError
from motifarch.files import write_sealed_json


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


def edit(folder: Path, **changes: object) -> None:
    path = folder / "data.json"
    content = {**json.loads(path.read_text()), **changes}
    del content["sha256"]
    write_sealed_json(path, content)


def test_open(prepared: Path) -> None:
    record = json.loads((prepared / "data.json").read_text())
    for split in ("train", "validation"):
        data = PackedDataset.open(prepared, split)
        assert len(data) == record["splits"][split]["blocks"]
        assert (data.seq_len, data.vocab_size, data.folder) == (32, 300, prepared)
        assert data.fingerprint == record["fingerprint"]
        assert data.tokenizer_fingerprint == record["tokenizer_fingerprint"]
        for block in (data[0], data[len(data) - 1]):
            assert block.input_ids.shape == (33,)
            assert block.input_ids.dtype == block.doc_lengths.dtype == np.int32
            assert block.doc_lengths.sum() == 33
    assert len(PackedDataset.open(str(prepared))) == record["splits"]["train"]["blocks"]


def test_rows_agree_with_the_datasets_library(prepared: Path) -> None:
    data = PackedDataset.open(prepared)
    rows = datasets.load_from_disk(str(prepared / "train"))
    assert rows.features["input_ids"] == datasets.List(datasets.Value("int32"), length=33)
    for index in range(0, len(data), 7):
        assert data[index].input_ids.tolist() == rows[index]["input_ids"]
        assert data[index].doc_lengths.tolist() == rows[index]["doc_lengths"]
        assert data.document_lengths(index).tolist() == rows[index]["doc_lengths"]


@pytest.mark.parametrize("index", [-1, 10**6])
def test_rows_outside(prepared: Path, index: int) -> None:
    with pytest.raises(IndexError):
        PackedDataset.open(prepared)[index]


def test_folders_that_are_not_prepared(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(UserError, match=r"none does not exist.*motifarch data prepare"):
        PackedDataset.open(tmp_path / "none")
    with pytest.raises(UserError, match="not a prepared data folder"):
        PackedDataset.open(tmp_path)
    with pytest.raises(UserError, match="no split 'test': take one of train, validation"):
        PackedDataset.open(prepared, "test")


def test_other_format_versions(copy: Path) -> None:
    edit(copy, format_version=99)
    with pytest.raises(UserError, match="format version 99, this motifarch reads versions 1 to 3"):
        PackedDataset.open(copy)


def test_damage_is_told(copy: Path) -> None:
    record = (copy / "data.json").read_text()
    (copy / "data.json").write_text(record[:100])
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        PackedDataset.open(copy)
    (copy / "data.json").write_text(record)
    (file,) = (copy / "train").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"train is damaged|train holds \d+ rows"):
        PackedDataset.open(copy)
    file.unlink()
    with pytest.raises(UserError, match="train is damaged"):
        PackedDataset.open(copy)


def test_ids_outside_the_vocabulary_are_told(copy: Path) -> None:
    edit(copy, vocab_size=5)
    data = PackedDataset.open(copy)
    with pytest.raises(UserError, match=r"row 0 of .*train holds token id \d+, outside the vocabulary of 5"):
        data[0]


def test_rows_of_another_length_are_told(copy: Path) -> None:
    edit(copy, seq_len=16)
    with pytest.raises(UserError, match=r"train is damaged .*\[33\].*expected .*\[17\]"):
        PackedDataset.open(copy)


@pytest.mark.parametrize(
    "change",
    [{"seq_len": "32"}, {"splits": []}, {"eos_token_id": -1}, {"inputs": None}, {"vocab_size": 2.5}, {"seq_len": 0}],
)
def test_a_record_of_another_shape_is_told(copy: Path, change: dict[str, object]) -> None:
    edit(copy, **change)
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        PackedDataset.open(copy)


def test_a_changed_record_is_told(copy: Path) -> None:
    path = copy / "data.json"
    text = path.read_text()
    for old, new in (('"eos_token_id": 0', '"eos_token_id": 1'), ("documents", "docvments"), ("  ", " \t"), ("9", "8")):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=r"data\.json is damaged"):
            PackedDataset.open(copy)


def read_all(folder: Path) -> list[list[list[int]]]:
    data = PackedDataset.open(folder)
    return [[part.tolist() for part in data[index][:2]] for index in range(len(data))]


def test_a_changed_bit_is_never_read(copy: Path) -> None:
    whole = read_all(copy)
    (file,) = (copy / "train").glob("*.arrow")
    content, draw, told = file.read_bytes(), random.Random(0), 0
    for _ in range(150):
        changed = bytearray(content)
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        file.write_bytes(changed)
        try:
            found = read_all(copy)
        except UserError:
            told += 1
        else:
            assert found == whole  # the bit is padding, or a name that nobody reads
    assert told > 120


def test_rows_in_another_place_are_told(copy: Path) -> None:
    rows = datasets.load_from_disk(str(copy / "train"))
    order = [1, 0, *range(2, len(rows))]
    rows.select(order).flatten_indices().save_to_disk(str(copy / "other"))
    shutil.rmtree(copy / "train")
    (copy / "other").rename(copy / "train")
    data = PackedDataset.open(copy)
    with pytest.raises(UserError, match=r"row 0 of .*has changed since it was prepared"):
        data[0]
    assert data[2].doc_lengths.sum() == 33


def test_a_file_cut_short_or_replaced_under_a_run_is_told(copy: Path) -> None:
    data, replaced = PackedDataset.open(copy), PackedDataset.open(copy)
    last = len(data) - 1
    data[last]
    (file,) = (copy / "train").glob("*.arrow")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UserError, match=f"row {last} of .*can't be read .*is cut short"):
        data[last]
    with pytest.raises(UserError, match=r"row 0 of .*another file than when the run began"):
        replaced[0]
    with pytest.raises(UserError, match=r"row 1 of .*another file than when the run began"):
        replaced.document_lengths(1)


def test_lengths_that_do_not_add_up_are_told(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PackedDataset.open(prepared)
    monkeypatch.setattr(data._rows, "read_lengths", lambda index: np.array([20, 12], "<i4").tobytes())
    with pytest.raises(UserError, match=r"row 3 of .* holds documents of 32 tokens in all, expected 33"):
        data.document_lengths(3)


def test_data_of_the_version_before_is_read(copy: Path) -> None:
    whole = read_all(copy)
    for split in ("train", "validation"):
        rows = datasets.load_from_disk(str(copy / split)).remove_columns("checksum")
        rows.save_to_disk(str(copy / "other"))
        shutil.rmtree(copy / split)
        (copy / "other").rename(copy / split)
    content = json.loads((copy / "data.json").read_text())
    del content["sha256"], content["checksums"]
    (copy / "data.json").write_text(json.dumps(content | {"format_version": 1}, indent=2, ensure_ascii=False))
    assert read_all(copy) == whole


def test_same_tokenizer_and_length(prepared: Path, corpus: Path, tmp_path: Path) -> None:
    source = ["--source", f"files:{corpus}/*.txt", "--num-proc", "1"]
    main([*source, "--output", str(tmp_path / "other"), "--vocab-size", "280", "--seq-len", "16"])
    main([*source, "--output", str(tmp_path / "same"), "--tokenizer", str(prepared / "tokenizer"), "--seq-len", "32"])
    ours, other, same = (PackedDataset.open(folder) for folder in (prepared, tmp_path / "other", tmp_path / "same"))
    check_same_tokenizer([])
    check_same_tokenizer([ours, same, PackedDataset.open(prepared, "validation")])
    check_same_seq_len([ours, same])
    with pytest.raises(UserError, match=f"{prepared} and {tmp_path / 'other'} were prepared with different tokenizers"):
        check_same_tokenizer([ours, same, other])
    with pytest.raises(UserError, match=r"different --seq-len \(32 and 16\)"):
        check_same_seq_len([ours, other])
