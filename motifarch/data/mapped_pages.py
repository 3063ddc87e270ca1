"""Pages of memory-mapped tables are given back after use: memory does not grow with the files.

The system would drop them too, but only when memory runs out; until then they count as this
process's. What is read again comes from the file. On Linux; elsewhere nothing is done.
"""

import ctypes
import sys
import threading
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

_MADV_DONTNEED = 4  # <asm-generic/mman-common.h>
_SECONDS_BETWEEN = 0.02


class MappedPages:
    """The pages of read-only files that a table lies in. It holds the table: what is dropped may
    be nobody else's memory.
    """

    def __init__(self, table: pa.Table) -> None:
        """Finds where the table's files are mapped; a table in memory has none."""
        self._table = table
        self._spans: list[tuple[int, int]] = []
        if sys.platform != "linux":
            return
        buffers = (b for column in table.columns for chunk in column.chunks for b in chunk.buffers() if b)
        addresses = sorted(buffer.address for buffer in buffers)
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                span, access, *_ = line.split(maxsplit=2)
                begin, end = (int(address, 16) for address in span.split("-"))
                at = bisect_left(addresses, begin)
                if "w" not in access and "/" in line and at < len(addresses) and addresses[at] < end:
                    self._spans.append((begin, end))
        self._madvise = ctypes.CDLL(None).madvise

    def give_back(self) -> None:
        """Drop those that this process holds."""
        for begin, end in self._spans:
            self._madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


@contextmanager
def pages_given_back(table: pa.Table) -> Iterator[None]:
    """Within, a thread gives a table's pages back, again and again."""
    pages, ended = MappedPages(table), threading.Event()

    def go_on() -> None:
        while not ended.wait(_SECONDS_BETWEEN):
            pages.give_back()

    thread = threading.Thread(target=go_on, daemon=True, name="pages")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        pages.give_back()
