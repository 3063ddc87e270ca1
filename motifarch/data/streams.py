"""Files as streams of bytes and of text: unpacked, and decoded by their byte order mark."""

import codecs
import io
import lzma
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import pyarrow as pa

from motifarch.data.remote_files import AnyFile

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}

# The first bytes of each format; zstd may begin with a frame to skip.
_MAGIC = {
    "gzip": rb"\x1f\x8b\x08",
    "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)",
    "xz": rb"\xfd7zXZ\0",
    "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
}
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@contextmanager
def open_unpacked(path: AnyFile) -> Iterator[io.BufferedReader]:
    """Open a file to read, unpacked if its first bytes or its name say that it is packed.

    What is cut short or followed by other bytes raises, which Python's own readers of bz2 and xz do
    not: they take a damaged second stream for the end.
    """
    with path.open("rb") as file:
        head = file.peek(16)[:16]
        found = (name for name, magic in _MAGIC.items() if re.match(magic, head, re.DOTALL))
        compression = next(found, COMPRESSED.get(path.suffix.lower()))
        if compression is None:
            yield file
        elif compression == "xz":
            yield io.BufferedReader(_XZReader(file))
        else:
            # An empty file is no packed nothing, but pyarrow takes it so.
            if not head:
                raise EOFError("the file is empty")
            yield io.BufferedReader(pa.CompressedInputStream(file, compression))


class _XZReader(io.RawIOBase):
    """Reads xz streams one after another, with the padding that may lie between them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor()
        self._data = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            if self._decoder.eof:
                self._data = self._decoder.unused_data.lstrip(b"\0")
                if not self._data:
                    self._data = self._file.read(2**16).lstrip(b"\0")
                    if not self._data:
                        return 0
                self._decoder = lzma.LZMADecompressor()
            elif self._decoder.needs_input and not self._data:
                self._data = self._file.read(2**16)
                if not self._data:
                    raise EOFError("the xz stream is cut short")
            unpacked = self._decoder.decompress(self._data, len(buffer))
            self._data = b""
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)


def marked_encoding(file: io.BufferedReader) -> str | None:
    """The encoding that a byte order mark names."""
    head = file.peek(4)[:4]
    return next((name for mark, name in _MARKS if head.startswith(mark)), None)


def decoded(file: io.BufferedReader, encoding: str, errors: str = "strict") -> io.TextIOWrapper:
    """The bytes as text, line ends as they are; a byte order mark says more than ``encoding``."""
    return io.TextIOWrapper(file, encoding=marked_encoding(file) or encoding, errors=errors, newline="\n")
