"""The Arrow files of a prepared split, of which any row's bytes can be read.

They are read at their places in the file, not through a memory map: where a file is cut short or
its disk fails under a run, that is an error here, and a signal that ends the process there.
"""

import os
from collections.abc import Sequence
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

_INT = 4
"""Bytes of a token, a length, an offset and a checksum."""
_OPEN_FILES = 64
"""Files that are kept open; a terabyte has more than a process may have open."""


class RowBytes(NamedTuple):
    """One row as it is stored."""

    input_ids: bytes
    """int32 [seq_len + 1]."""
    doc_lengths: bytes
    """int32 [documents]."""
    checksum: int | None
    """None in data that was prepared before rows had one."""


class _Batches(NamedTuple):
    """Where the batches of rows are: one entry for each, in the rows' order."""

    file: list[int]
    rows: list[int]
    tokens: list[int]
    """Where in the file its first token is."""
    offsets: list[int]
    """Where its first offset into the lengths is."""
    lengths: list[int]
    checksums: list[int]


class BlockFiles:
    """The rows of a split's files, one after the other; files are opened when they are read first.

    Raises:
        ValueError: a file is no Arrow file of such rows, or is cut short.
        OSError: a file can't be read.
    """

    def __init__(self, files: Sequence[Path], seq_len: int, *, checksums: bool) -> None:
        self._files = list(files)
        self._width = seq_len + 1
        self._checksums = checksums
        self._states = [_state(path) for path in self._files]
        self._batches = _Batches([], [], [], [], [], [])
        for number, path in enumerate(self._files):
            self._find_batches(number, path)
        self._starts = np.cumsum([0, *self._batches.rows])
        self._open = lru_cache(maxsize=_OPEN_FILES)(self._open_file)

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def read(self, index: int) -> RowBytes:
        """One row's bytes, which are the caller's to check.

        Raises:
            OSError: they can't be read, or the file is cut short or another than at the start.
        """
        file, number, row = self._find(index)
        tokens = _read(file, self._width * _INT, self._batches.tokens[number] + row * self._width * _INT)
        checksum = None
        if self._checksums:
            checksum = int.from_bytes(_read(file, _INT, self._batches.checksums[number] + row * _INT), "little")
        return RowBytes(tokens, self.read_lengths(index), checksum)

    def read_lengths(self, index: int) -> bytes:
        """One row's lengths alone, int32 [documents]: two short reads.

        Raises:
            OSError: as `read`.
        """
        file, number, row = self._find(index)
        offsets = np.frombuffer(_read(file, 2 * _INT, self._batches.offsets[number] + row * _INT), dtype="<i4")
        first, last = offsets.tolist()
        if not 0 <= first <= last <= first + self._width:
            raise OSError(f"{file.name} is damaged: a row has documents {first} to {last}")
        return _read(file, (last - first) * _INT, self._batches.lengths[number] + first * _INT)

    def _find(self, index: int) -> tuple[FileIO, int, int]:
        """A row's file, its batch's number and its place in the batch."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._open(self._batches.file[number]), number, index - int(self._starts[number])

    def _open_file(self, number: int) -> FileIO:
        path = self._files[number]
        file = FileIO(path)
        if _state(file.fileno()) != self._states[number]:
            raise OSError(f"{path} is another file than when the run began")
        return file

    def _find_batches(self, number: int, path: Path) -> None:
        """Notes where the file's batches are; of the map, the pages of their headers are read."""
        expected = {"input_ids": pa.list_(pa.int32(), self._width), "doc_lengths": pa.list_(pa.int32())}
        if self._checksums:
            expected["checksum"] = pa.uint32()
        with pa.memory_map(str(path)) as source:
            whole = source.read_buffer()
            stream = pa.ipc.open_stream(whole)
            found = dict(zip(stream.schema.names, stream.schema.types, strict=True))
            if found != expected:
                raise ValueError(f"{path} has the columns {found}, expected {expected}")
            for batch in stream:
                tokens, lengths = batch.column("input_ids"), batch.column("doc_lengths")
                buffers = [tokens.buffers()[-1], lengths.buffers()[1], lengths.buffers()[-1]]
                if self._checksums:
                    buffers.append(batch.column("checksum").buffers()[1])
                places = [buffer.address - whole.address if buffer is not None else -1 for buffer in buffers]
                if not all(0 <= place < whole.size for place in places):
                    raise ValueError(f"{path} is compressed or damaged")
                entry = (number, batch.num_rows, *places, *([] if self._checksums else [0]))
                for column, value in zip(self._batches, entry, strict=True):
                    column.append(value)


def _state(file: Path | int) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _read(file: FileIO, size: int, place: int) -> bytes:
    content = os.pread(file.fileno(), size, place)
    if len(content) != size:
        raise OSError(f"{file.name} is cut short: {size} bytes at {place} are not all there")
    return content
