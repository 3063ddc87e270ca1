import bz2
import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from motifarch.data.documents import Document, Skipped
from motifarch.data.readers import read_file


def read(path: Path, field: str = "text") -> list[Document | Skipped]:
    return list(read_file(path, path.name, field))


@pytest.mark.parametrize("name", ["a.txt", "b.py", "README", "c.1.md"])
def test_any_other_file_is_one_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one\ntwo\n")
    assert read(tmp_path / name) == [Document(name, "one\ntwo\n")]


def test_json_lines_by_record(tmp_path: Path) -> None:
    lines = ['{"text": "one"}', "", "{broken", '{"other": 1}', '{"text": ""}', "[1]", '{"text": null}', '{"text": "λ"}']
    content = "\n".join(lines).encode() + b'\n{"text": "\xff"}\n'
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert read(path) == [
        Document("a.jsonl:1", "one"),
        Skipped("a.jsonl:3", "not JSON"),
        Skipped("a.jsonl:4", "no field 'text'"),
        Skipped("a.jsonl:5", "empty"),
        Skipped("a.jsonl:6", "no field 'text'"),
        Skipped("a.jsonl:7", "no text"),
        Document("a.jsonl:8", "λ"),
        Skipped("a.jsonl:9", "not UTF-8"),
    ]


def test_json_arrays_objects_and_lines(tmp_path: Path) -> None:
    records = [{"body": "one"}, {"body": "two"}]
    for name, content in {
        "array.json": json.dumps(records, indent=1),
        "lines.json": "\n".join(map(json.dumps, records)),
    }.items():
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name, "body") == [Document(f"{name}:1", "one"), Document(f"{name}:2", "two")]
    (tmp_path / "one.json").write_text('{"body": "alone"}')
    assert read(tmp_path / "one.json", "body") == [Document("one.json:1", "alone")]


def test_parquet_by_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1, 2, 3], "body": ["one", None, "three"]}), path)
    assert read(path, "body") == [
        Document("a.parquet:1", "one"),
        Skipped("a.parquet:2", "no text"),
        Document("a.parquet:3", "three"),
    ]
    assert read(path, "text") == [Skipped("a.parquet", "no field 'text'")]


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_files(tmp_path: Path, suffix: str, module: object) -> None:
    (tmp_path / f"a.txt.{suffix}").write_bytes(module.compress(b"text"))  # type: ignore[attr-defined]
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(module.compress(b'{"text": "x"}\n'))  # type: ignore[attr-defined]
    assert read(tmp_path / f"a.txt.{suffix}") == [Document(f"a.txt.{suffix}", "text")]
    assert read(tmp_path / f"b.jsonl.{suffix}") == [Document(f"b.jsonl.{suffix}:1", "x")]


@pytest.mark.parametrize("name", ["bad.parquet", "bad.txt.gz", "bad.jsonl.gz", "bad.txt.xz", "bad.txt.bz2"])
def test_damaged_containers_are_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"these are not the bytes of such a file")
    (skipped,) = read(tmp_path / name)
    assert isinstance(skipped, Skipped)
    assert skipped.reason.startswith("unreadable")


def test_truncated_compression_keeps_what_came_before(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "record %d"}\n' % number for number in range(50_000))
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(lines)[:-5000])
    documents = read(path)
    assert documents[0] == Document("cut.jsonl.gz:1", "record 0")
    assert documents[-1] == Skipped("cut.jsonl.gz", "unreadable: EOFError")
