import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from motifarch.data.documents import LONGEST, Document, Found, ReadOptions, Skipped
from motifarch.data.readers import read_file


def read(path: Path, field: str = "text", **options: Any) -> list[Found]:
    return list(read_file(path, path.name, ReadOptions(field, **options)))


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


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, "zstd", asbytes=True))


PACKERS = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", zstd)]


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
def test_compressed_files(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.txt.{suffix}").write_bytes(pack(b"text"))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(pack(b'{"text": "x"}\n') + pack(b'{"text": "y"}\n'))
    (tmp_path / "without").write_bytes(pack(b"no suffix"))
    assert read(tmp_path / f"a.txt.{suffix}") == [Document(f"a.txt.{suffix}", "text")]
    assert [found.text for found in read(tmp_path / f"b.jsonl.{suffix}")] == ["x", "y"]  # type: ignore[union-attr]
    assert read(tmp_path / "without") == [Document("without", "no suffix")]


@pytest.mark.parametrize(("suffix", "pack"), PACKERS)
@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b + b"and more", lambda b: b + b"X" + b[1:]])
def test_nothing_after_a_whole_stream_is_lost_in_silence(
    tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], damage: Callable[[bytes], bytes]
) -> None:
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(damage(pack(b'{"text": "x"}\n' * 9)))
    last = read(tmp_path / f"a.jsonl.{suffix}")[-1]
    assert isinstance(last, Skipped)
    assert last.reason.startswith("unreadable")


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.txt"])
def test_archives_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    path = tmp_path / name
    if name.startswith("a.tar"):
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
            tar.add(tmp_path / "one.txt")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "one.txt")
            archive.write(tmp_path / "two.txt")
    assert read(path) == [Skipped(name, "an archive")]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_believed(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("한국어\r\nλ".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes('{"text": "한"}\n{"text": "λ"}\n'.encode(encoding))
    assert read(tmp_path / "a.txt") == [Document("a.txt", "한국어\r\nλ")]
    assert read(tmp_path / "b.jsonl") == [Document("b.jsonl:1", "한"), Document("b.jsonl:2", "λ")]


def test_other_encodings_are_skipped_or_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("한국어".encode("cp949"))
    (tmp_path / "b.jsonl").write_bytes('{"text": "한"}\n{"text": "x"}\n'.encode("cp949"))
    assert read(tmp_path / "a.txt") == [Skipped("a.txt", "not UTF-8")]
    assert read(tmp_path / "b.jsonl") == [Skipped("b.jsonl:1", "not UTF-8"), Document("b.jsonl:2", "x")]
    assert read(tmp_path / "a.txt", encoding="cp949") == [Document("a.txt", "한국어")]
    assert read(tmp_path / "b.jsonl", encoding="cp949")[0] == Document("b.jsonl:1", "한")


def test_line_ends_within_text_end_no_record(tmp_path: Path) -> None:
    text = "one\u2028two\x85three\x0bfour\r\nfive"
    lines = json.dumps({"text": text}, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl").write_bytes(("\ufeff" + lines + "\ufeff" + lines).encode())  # as of cat a b
    (tmp_path / "b.json").write_bytes((lines * 2).encode())
    for name in ("a.jsonl", "b.json"):
        assert read(tmp_path / name) == [Document(f"{name}:{number}", text) for number in (1, 2)]


def test_fields_within_fields_and_deep_nesting(tmp_path: Path) -> None:
    lines = ['{"meta": {"body": "in"}}', '{"meta.body": "named so"}', '{"meta": 3}', "[" * 100_000]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read(tmp_path / "a.jsonl", "meta.body")
    assert found[:2] == [Document("a.jsonl:1", "in"), Document("a.jsonl:2", "named so")]
    assert found[2:] == [Skipped("a.jsonl:3", "no field 'meta.body'"), Skipped("a.jsonl:4", "JSON nested too deeply")]


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    records = [{"messages": messages}, {"text": "plain", "messages": messages}, {"text": None, "messages": messages}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    pq.write_table(pa.table({"messages": [messages, None]}), tmp_path / "a.parquet")

    def template(messages: list[dict[str, Any]]) -> str:
        return "".join(f"({m['role']}) {m['content']}" for m in messages)

    chat = Document("a.jsonl:1", "(user) hi(assistant) ho", is_chat=True)
    found = read(tmp_path / "a.jsonl", chat_text=template)
    assert found == [chat, Document("a.jsonl:2", "plain"), Document("a.jsonl:3", chat.text, is_chat=True)]
    without = Skipped("a.jsonl:1", "messages without a chat template")
    assert read(tmp_path / "a.jsonl")[0] == without
    assert [type(one) for one in read(tmp_path / "a.parquet", chat_text=template)] == [Document, Skipped]


def test_arrays_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    texts = ["한" * 700_000, "", "short", "x" * 1_500_000, '\\"]}[{,', "end"]
    whole = json.dumps([{"text": text, "n": 10**9} for text in texts], ensure_ascii=False)
    (tmp_path / "a.json").write_text(whole)
    found = read(tmp_path / "a.json")
    assert [one.text if isinstance(one, Document) else "" for one in found] == texts
    (tmp_path / "cut.json").write_text(whole[:-20])
    assert [type(one) for one in read(tmp_path / "cut.json")][-2:] == [Document, Skipped]
    (tmp_path / "bad.json").write_text('[{"text": "a"}, {"text": oh}, {"text": "b"}]')
    found = read(tmp_path / "bad.json")
    assert found == [Document("bad.json:1", "a"), Skipped("bad.json:2", "not JSON, with all that follows in its file")]


def test_tables_with_the_field_are_records(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines, one ""field"""\n2,\n')
    (tmp_path / "b.tsv").write_text("text\tid\none\t1\n")
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    assert read(tmp_path / "a.csv") == [Document("a.csv:1", 'two\nlines, one "field"'), Skipped("a.csv:2", "empty")]
    assert read(tmp_path / "b.tsv") == [Document("b.tsv:1", "one")]
    assert read(tmp_path / "c.csv") == [Document("c.csv", "x,y\n1,2\n")]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_columns_of_every_kind_of_string(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["one", None, "한"]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    for name, make in (("a.arrow", pa.ipc.new_file), ("b.arrow", pa.ipc.new_stream)):
        with make(tmp_path / name, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        expected = [Document(f"{name}:1", "one"), Skipped(f"{name}:2", "no text"), Document(f"{name}:3", "한")]
        assert read(tmp_path / name) == expected


@pytest.mark.parametrize("separator", ["\n", "\n\n", "<|endoftext|>"])
def test_a_separator_makes_documents_of_a_text_file(tmp_path: Path, separator: str) -> None:
    texts = [f"{number} {'word ' * 40_000}" for number in range(9)]
    (tmp_path / "a.txt").write_text(separator.join([*texts, ""]))
    assert [found.text for found in read(tmp_path / "a.txt", separator=separator)] == texts  # type: ignore[union-attr]


def test_a_text_longer_than_anything_is_cut_at_line_ends(tmp_path: Path) -> None:
    line = "한 line of some length\n"
    text = line * (LONGEST * 2 // len(line))
    (tmp_path / "a.txt").write_text(text)
    found = [one for one in read(tmp_path / "a.txt") if isinstance(one, Document)]
    assert "".join(one.text for one in found) == text
    assert [one.part for one in found] == list(range(1, len(found) + 1))
    assert all(one.text.endswith("\n") and len(one.text) <= LONGEST for one in found)
    (tmp_path / "b.txt").write_text("x" * (LONGEST + 5))
    assert [len(one.text) for one in read(tmp_path / "b.txt")] == [LONGEST, 5]  # type: ignore[union-attr]


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
    assert documents[-1] == Skipped("cut.jsonl.gz", "unreadable: OSError")
