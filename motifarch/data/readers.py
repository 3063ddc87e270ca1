"""Readers of files: plain text, JSON, JSON Lines, CSV, Parquet and Arrow, packed or not."""

import csv
import io
import json
import lzma
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from motifarch.data.documents import Document, ReadOptions, Skipped, document, parts, record_document
from motifarch.data.remote_files import AnyFile
from motifarch.data.streams import COMPRESSED, decoded, marked_encoding, open_unpacked
from motifarch.errors import first_line

RECORDS = {".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather"}
"""Suffixes of files that hold records."""

_PIECE = 2**20
_BETWEEN = re.compile(r"[\s,]*")
_LONGEST_LITERAL = len("-Infinity")
_ROWS_BYTES = 2**23
_DAMAGED = (OSError, EOFError, lzma.LZMAError, pa.ArrowException, csv.Error)


def file_kind(path: AnyFile) -> str:
    """The suffix that says what a file holds, past the one that says how it is packed."""
    kind = path.suffix.lower()
    return Path(path.stem).suffix.lower() if kind in COMPRESSED else kind


def read_file(path: AnyFile, name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    """Yield a file's documents.

    A text file (any suffix not named here) is one document; each line of ``.jsonl``, each member of
    a ``.json`` array, each row of ``.parquet`` and ``.arrow``, and of a ``.csv`` or ``.tsv`` whose
    first line names the text field, is one. A file that cannot be read is skipped from there on.
    ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` are unpacked on the way; messages call the file
    ``name``.
    """
    kind = file_kind(path)
    try:
        if kind in (".parquet", ".arrow", ".feather"):
            read = _read_parquet if kind == ".parquet" else _read_arrow
            yield from read(path, name, options)
            return
        delimiter = {".csv": ",", ".tsv": "\t"}.get(kind)
        if delimiter and _names_field(path, delimiter, options):
            with open_unpacked(path) as file:
                yield from _read_table(decoded(file, options.encoding), name, delimiter, options)
            return
        with open_unpacked(path) as file:
            if kind in (".jsonl", ".ndjson"):
                yield from _read_lines(decoded(file, options.encoding, "surrogateescape"), name, options)
            elif kind == ".json":
                yield from _read_json(decoded(file, options.encoding, "surrogateescape"), name, options)
            elif archive := _archive(file):
                yield Skipped(name, "an archive", detail=f"unpack the {archive} file")
            elif b"\0" in file.peek(2**12) and not marked_encoding(file):
                yield Skipped(name, "binary")
            else:
                yield from _read_text(decoded(file, options.encoding), name, options)
    except UnicodeDecodeError as error:
        yield Skipped(name, f"not {error.encoding.upper()}", detail="convert it with iconv, or give --encoding")
    except _DAMAGED as error:
        yield Skipped(name, f"unreadable: {type(error).__name__}", detail=str(error)[:80])


def _archive(file: io.BufferedReader) -> str | None:
    head = file.peek(512)[:512]
    return "zip" if head.startswith(b"PK\x03\x04") else "tar" if head[257:262] == b"ustar" else None


def _read_text(file: io.TextIOWrapper, name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    pieces = iter(lambda: file.read(_PIECE), "")
    if options.separator is not None:
        for number, text in enumerate(_separated(pieces, options.separator), start=1):
            if text and not text.isspace():
                yield document(f"{name}:{number}", text)
        return
    yield from parts(name, pieces)


def _separated(pieces: Iterable[str], separator: str) -> Iterator[str]:
    begun: list[str] = []  # of a text whose separator has not come yet
    tail = ""  # its last characters, with which the separator may begin
    for piece in pieces:
        *texts, rest = (tail + piece).split(separator)
        for text in texts:
            yield "".join([*begun, text])
            begun = []
        tail = rest[max(0, len(rest) - len(separator) + 1) :]
        begun.append(rest.removesuffix(tail))
    yield "".join([*begun, tail])


def _names_field(path: AnyFile, delimiter: str, options: ReadOptions) -> bool:
    with open_unpacked(path) as file:
        first = decoded(file, options.encoding, "surrogateescape").readline(_PIECE)
    return any({options.text_field, "messages"} & set(row) for row in csv.reader([first], delimiter=delimiter))


def _read_table(
    file: io.TextIOWrapper, name: str, delimiter: str, options: ReadOptions
) -> Iterator[Document | Skipped]:
    csv.field_size_limit(2**31 - 1)
    for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), start=1):
        yield record_document(f"{name}:{number}", row, options)


def _read_parquet(path: AnyFile, name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    with path.open("rb") as file, pyarrow.parquet.ParquetFile(file, buffer_size=_PIECE) as table:
        columns = _columns(table.schema_arrow.names, options)
        if not columns:
            yield _no_field(name, table.schema_arrow.names, options)
            return
        # Rows at once: as many as hold some megabytes in the row group whose rows are the largest.
        groups = [table.metadata.row_group(number) for number in range(table.metadata.num_row_groups)]
        row_bytes = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        rows = max(1, min(1000, _ROWS_BYTES // max(1, row_bytes)))
        batches = table.iter_batches(batch_size=rows, columns=columns)
        yield from _read_batches(batches, name, options)


def _read_arrow(path: AnyFile, name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    with path.open("rb") as file:
        if file.peek(6)[:6] == b"ARROW1":
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            table = batches = pa.ipc.open_stream(file)
        columns = _columns(table.schema.names, options)
        if not columns:
            yield _no_field(name, table.schema.names, options)
            return
        yield from _read_batches((batch.select(columns) for batch in batches), name, options)


def _columns(names: list[str], options: ReadOptions) -> list[str]:
    root = options.text_field if options.text_field in names else options.text_field.partition(".")[0]
    return [column for column in dict.fromkeys((root, "messages")) if column in names]


def _no_field(name: str, names: list[str], options: ReadOptions) -> Skipped:
    return Skipped(name, f"no field {options.text_field!r}", detail=f"has {', '.join(names)[:80]}")


def _read_batches(batches: Iterable[pa.RecordBatch], name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    number = 0
    for batch in batches:
        for first in range(0, len(batch), 16):
            for record in batch.slice(first, 16).to_pylist():
                number += 1
                yield record_document(f"{name}:{number}", record, options)


def _read_lines(lines: Iterable[str], name: str, options: ReadOptions, number: int = 0) -> Iterator[Document | Skipped]:
    for line in lines:
        number += 1
        line = line.removeprefix("\ufeff")  # where files with a mark were put together
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError:
            yield Skipped(where, "not JSON") if _is_text(line) else _not_text(where, options)
        except RecursionError:
            yield Skipped(where, "JSON nested too deeply")
        else:
            # Bytes that are no text came through as half surrogate pairs.
            yield record_document(where, record, options) if _is_text(line) else _not_text(where, options)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _not_text(name: str, options: ReadOptions) -> Skipped:
    return Skipped(name, f"not {options.encoding.upper()}", detail="convert it with iconv, or give --encoding")


def _read_json(file: io.TextIOWrapper, name: str, options: ReadOptions) -> Iterator[Document | Skipped]:
    """An array of records, one record, or JSON Lines, to which many datasets give this suffix."""
    text = file.read(_PIECE).removeprefix("\ufeff")
    if text.lstrip().startswith("["):
        number = 0
        try:
            for number, record in enumerate(_members(text, file), start=1):
                yield record_document(f"{name}:{number}", record, options)
        except (ValueError, RecursionError) as error:
            reason = "not JSON, with all that follows in its file"
            yield Skipped(f"{name}:{number + 1}", reason, detail=first_line(error))
        return
    line, newline, rest = text.partition("\n")
    if newline and _is_json(line):
        yield from _read_lines([line], name, options)
        # What was read ahead may end within a line.
        yield from _read_lines(chain((rest + file.readline()).split("\n"), file), name, options, number=1)
        return
    text += file.read()
    if _is_json(text):
        yield record_document(f"{name}:1", json.loads(text), options)
    elif text.strip():
        yield from _read_lines(text.split("\n"), name, options)
    else:
        yield Skipped(name, "empty")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _members(text: str, file: io.TextIOWrapper) -> Iterator[object]:
    """The members of a JSON array that begins in ``text`` and goes on in ``file``, one by one."""
    decoder = json.JSONDecoder()
    place = text.index("[") + 1
    while True:
        between = _BETWEEN.match(text, place)
        assert between is not None
        place = between.end()
        if text[place : place + 1] == "]":
            if (text[place + 1 :] + file.read(_PIECE)).strip():
                raise ValueError("text after the array's end")
            return
        ended = place
        try:
            if place < len(text):
                member, ended = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            # Is it wrong, or is only its beginning here?
            if error.pos < len(text) - _LONGEST_LITERAL and not error.msg.startswith("Unterminated"):
                raise
            ended = len(text)
        if ended < len(text):
            yield member
            place = ended
            continue
        # Twice as much each time, so that a long member is not parsed many times.
        more = file.read(max(_PIECE, len(text) - place))
        if not more:
            raise ValueError("the array has no end")
        text, place = text[place:] + more, 0
