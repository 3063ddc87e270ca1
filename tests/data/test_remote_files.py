"""Sources in stores: a real s3fs against moto's server, and fsspec's own memory."""

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.registry import _registry as registered

from helpers.object_storage import s3_server
from motifarch.data.documents import Document, ReadOptions, Skipped
from motifarch.data.prepare import main
from motifarch.data.sources import FileSource, each_file_once, parse_source
from motifarch.errors import UserError

CONTENT: dict[str, bytes] = {
    "a.jsonl": b'{"text": "one"}\n{"text": ""}\n{"text": "two"}\n',
    "deep/b.jsonl.zst": pa.compress(b'{"text": "three"}\n', "zstd", asbytes=True),
    "deep/er/c.txt.gz": gzip.compress("넷".encode()),
    "deep/er/d.json": b'[{"text": "five"}, {"text": "six"}]',
    "odd [x]/e.txt": b"seven",
    ".hidden/f.txt": b"never",
}
TEXTS = ["one", "two", "three", "넷", "five", "six", "seven"]


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    """A server of S3's interface, to which the environment leads."""
    with s3_server(bucket="corpus"):
        yield


def put(url: str, content: bytes) -> None:
    with fsspec.open(url, "wb", auto_mkdir=True) as file:
        file.write(content)


@pytest.fixture(params=["s3://corpus", "memory://corpus", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder's URL, in three kinds of store, with the content."""
    if request.param == "s3://corpus":
        request.getfixturevalue("s3")
    folder = f"file://{tmp_path}" if request.param == "file" else f"{request.param}/{tmp_path.name}"
    for name, content in CONTENT.items():
        put(f"{folder}/{name}", content)
    yield folder
    if request.param.startswith("memory"):
        fsspec.filesystem("memory").rm("/corpus", recursive=True)


def parse(spec: str) -> FileSource:
    source = parse_source(spec)
    assert isinstance(source, FileSource)
    return source


def names(spec: str) -> list[str]:
    return [name for name, _ in parse(spec).files]


def test_every_kind_of_file_is_read_by_name(store: str) -> None:
    source = parse(store)
    found = list(source.documents(ReadOptions()))
    assert [one.text for one in found if isinstance(one, Document)] == TEXTS
    assert [(one.name, one.reason) for one in found if isinstance(one, Skipped)] in (
        [(".hidden/f.txt", "hidden file"), ("a.jsonl:2", "empty")],
        [(".hidden/", "hidden folder"), ("a.jsonl:2", "empty")],
    )
    assert [name for name, _ in source.files] == [name for name in sorted(CONTENT) if name[0] != "."]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.jsonl"]),
        ("**/*.jsonl*", ["a.jsonl", "deep/b.jsonl.zst"]),
        ("**", ["a.jsonl", "deep/b.jsonl.zst", "deep/er/c.txt.gz", "deep/er/d.json", "odd [x]/e.txt"]),
        ("deep/**/*.{gz,zst}", ["b.jsonl.zst", "er/c.txt.gz"]),
        ("{deep,none}/er/?.json", ["d.json"]),
        ("odd [x]/e.txt", ["e.txt"]),
        ("odd [x]", ["e.txt"]),
        ("*/er/[a-c]*", ["c.txt.gz"]),
    ],
)
def test_patterns_are_those_of_local_files(store: str, pattern: str, expected: list[str]) -> None:
    assert names(f"{store}/{pattern}") == expected
    assert names(f"files:{store}/{pattern}") == expected


def test_what_a_pattern_leaves_out_is_named(store: str) -> None:
    left_out = parse(f"{store}/[ado]*").left_out
    assert [skipped.name.rpartition("/")[0].rpartition("/")[2] for skipped in left_out] == ["deep", "odd [x]"]


def test_state_tells_changes(store: str) -> None:
    states = [parse(store).state()]
    assert parse(store).state() == states[0]
    assert states[0]["files"] == 5
    assert states[0]["bytes"] == sum(len(content) for name, content in CONTENT.items() if name[0] != ".")
    put(f"{store}/a.jsonl", CONTENT["a.jsonl"].replace(b"one", b"eno"))
    states.append(parse(store).state())
    put(f"{store}/new.txt", b"new")
    states.append(parse(store).state())
    assert len({state["stamp"] for state in states}) == 3


def test_tables_stream(store: str) -> None:
    table = pa.table({"n": range(5000), "meta": [{"text": f"row {n}"} for n in range(5000)]})
    with fsspec.open(f"{store}/t/a.parquet", "wb") as file:
        pq.write_table(table, file, row_group_size=1000)
    with fsspec.open(f"{store}/t/b.arrow", "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    found = list(parse(f"{store}/t/*").documents(ReadOptions("meta.text")))
    assert [one.text for one in found if isinstance(one, Document)] == [f"row {n}" for n in range(5000)] * 2


def test_a_file_of_two_sources_is_read_once(store: str) -> None:
    sources = each_file_once([parse(f"{store}/deep"), parse(f"{store}/deep/er/*")])
    found = [one for source in sources for one in source.documents(ReadOptions())]
    assert [one.text for one in found if isinstance(one, Document)] == ["three", "넷", "five", "six"]
    assert sum(isinstance(one, Skipped) and one.reason.startswith("read already") for one in found) == 2


def test_prepared_from_a_store_as_from_disk(
    s3: None, tmp_path: Path, make_text: Callable[..., str], tokenizer_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = "\n".join(json.dumps({"text": make_text(i)}) for i in range(12)).encode()
    (tmp_path / "x.jsonl").write_bytes(lines)
    put("s3://corpus/prepared/x.jsonl", lines)
    common = ["--tokenizer", str(tokenizer_folder), "--seq-len", "16", "--num-proc", "1"]
    for output, source in {"disk": f"files:{tmp_path}/*.jsonl", "store": "s3://corpus/prepared/*.jsonl"}.items():
        assert main(["--source", source, "--output", str(tmp_path / output), *common]) == 0
    records = [json.loads((tmp_path / output / "data.json").read_text()) for output in ("disk", "store")]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    again = ["--source", "s3://corpus/prepared/*.jsonl", "--output", str(tmp_path / "store"), *common]
    capsys.readouterr()
    assert main(again) == 0
    assert "already prepared" in capsys.readouterr().out
    put("s3://corpus/prepared/x.jsonl", lines + lines)
    with pytest.raises(UserError, match=r"the files of s3://corpus/prepared/\*\.jsonl have changed"):
        main(again)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("s3://no-such-bucket/**/*.jsonl", r"no-such-bucket"),
        ("s3://corpus/none/*.txt", r"matches no file.*check bucket and path"),
        ("s3://corpus/none.txt", r"matches no file"),
        ("memory://nothing/*", r"matches no file|there is no 'nothing'"),
        ("nope://x/*.txt", r"nothing known reads nope://"),
        ("gs://bucket/*.txt", r'pip install "motifarch\[gcs\]"'),
    ],
)
def test_what_is_not_there_is_one_message(s3: None, spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_source(spec)
    assert "\n" not in str(error.value)


def test_a_store_out_of_reach_or_closed_is_one_message(s3: None, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("Access Denied")

    system = fsspec.get_filesystem_class("s3")
    with monkeypatch.context() as patch:
        patch.setattr("s3fs.S3FileSystem._info", refuse)
        system.clear_instance_cache()  # they keep methods
        with pytest.raises(UserError, match="permission denied"):
            parse_source("s3://corpus/*.txt")
    system.clear_instance_cache()
    put("s3://corpus/broken/a.jsonl", (json.dumps({"text": "one " * 2**18}).encode() + b"\n") * 12)
    fetch = s3fs.S3File._fetch_range

    def fail(file: Any, start: int, end: int) -> bytes:
        if start:
            raise ConnectionError("reset by peer")
        return fetch(file, start, end)

    monkeypatch.setattr("s3fs.S3File._fetch_range", fail)
    found = parse("s3://corpus/broken").documents(ReadOptions())
    assert isinstance(next(found), Document)
    with pytest.raises(UserError, match=r"s3://corpus/broken/a\.jsonl can't be used: the server can't be reached"):
        list(found)  # no text is skipped as damaged


def test_without_s3fs_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed
    monkeypatch.delitem(registered, "s3", raising=False)
    with pytest.raises(UserError, match=r'pip install "motifarch\[s3\]"'):
        parse_source("s3://bucket/*.txt")
