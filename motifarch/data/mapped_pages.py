"""Pages of memory-mapped files are given back after use: memory does not grow with the files."""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MADV_DONTNEED = 4  # <asm-generic/mman-common.h>
_MOST = 2**25  # bytes
_SECONDS_BETWEEN = 0.01  # documents in random order map gigabytes a second, for neighbours come along


@contextmanager
def pages_given_back(*folders: Path) -> Iterator[None]:
    """Within, this process holds little of what it has mapped below the folders, on Linux: 32 MiB,
    and what it reads in some hundredths of a second.
    """
    ended = threading.Event()

    def go_on() -> None:
        others = _mapped_bytes()
        while not ended.wait(_SECONDS_BETWEEN):
            if _mapped_bytes() > others + _MOST:
                give_back_pages(*folders)
                others = _mapped_bytes()

    if sys.platform != "linux":
        yield
        return
    thread = threading.Thread(target=go_on, daemon=True, name="pages")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _mapped_bytes() -> int:
    """Of files, in memory, that this process has mapped."""
    return int(Path("/proc/self/statm").read_bytes().split()[2]) * mmap.PAGESIZE


def give_back_pages(*folders: Path) -> None:
    """Drop this process's pages of read-only files mapped below the folders, on Linux.

    The system would do so too, but only when memory runs out; until then they count as this
    process's. What is read again comes from the file.
    """
    if sys.platform != "linux":
        return
    madvise, below = ctypes.CDLL(None).madvise, tuple(f"{folder.resolve()}/" for folder in folders)
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            span, access, *_, path = (*line.rstrip("\n").split(maxsplit=5), "")[:6]
            if path.startswith(below) and "w" not in access:
                begin, end = (int(address, 16) for address in span.split("-"))
                madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)
