"""Readers of local files: plain text, JSON, JSON Lines and Parquet, compressed or not."""

import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet

from motifarch.data.documents import Document, Skipped, document

_COMPRESSED = {".gz", ".bz2", ".xz", ".zst"}


def read_file(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    """Yield a file's documents.

    A text file (any other suffix) is one document; each line of ``.jsonl``, each member of a
    ``.json`` array and each row of ``.parquet`` is one, its text in ``text_field``. A file that
    cannot be read is skipped from there on. ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` are unpacked on
    the way; messages call the file ``name``.
    """
    kind = path.suffix.lower()
    if kind in _COMPRESSED:
        kind = Path(path.stem).suffix.lower()
    try:
        if kind == ".parquet":
            yield from _read_parquet(path, name, text_field)
            return
        with fsspec.open(str(path), "rb", compression="infer") as file:
            if kind in (".jsonl", ".ndjson"):
                yield from _read_lines(file, name, text_field)
            elif kind == ".json":
                yield from _read_json(file.read(), name, text_field)
            else:
                yield document(name, file.read())
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException) as error:
        yield Skipped(name, f"unreadable: {type(error).__name__}")


def _read_parquet(path: Path, name: str, text_field: str) -> Iterator[Document | Skipped]:
    with pyarrow.parquet.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            yield Skipped(name, f"no field {text_field!r}")
            return
        number = 0
        for batch in file.iter_batches(batch_size=1000, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield document(f"{name}:{number}", text)


def _read_json(content: bytes, name: str, text_field: str) -> Iterator[Document | Skipped]:
    try:
        members = json.loads(content)
    except ValueError:
        yield from _read_lines(content.splitlines(), name, text_field)  # many datasets give JSON Lines this suffix
        return
    for number, member in enumerate(members if isinstance(members, list) else [members], start=1):
        yield _member(f"{name}:{number}", member, text_field)


def _read_lines(lines: Iterable[bytes], name: str, text_field: str) -> Iterator[Document | Skipped]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _member(f"{name}:{number}", json.loads(line), text_field)
        except UnicodeDecodeError:
            yield Skipped(f"{name}:{number}", "not UTF-8")
        except ValueError:
            yield Skipped(f"{name}:{number}", "not JSON")


def _member(name: str, member: object, text_field: str) -> Document | Skipped:
    if not isinstance(member, dict) or text_field not in member:
        return Skipped(name, f"no field {text_field!r}")
    return document(name, member[text_field])
