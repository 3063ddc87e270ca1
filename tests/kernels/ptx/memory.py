"""Global memory: the tensors of a launch between guard zones, and races among its threads."""

import bisect

import numpy as np

from tests.kernels.ptx.ordering import Clocks, Time
from tests.kernels.ptx.program import Fault

BASE = 1 << 40
GUARD = 4096  # bytes between allocations
WIDTHS = (1, 2, 4, 8, 16)


def rows(data: np.ndarray) -> dict[int, np.ndarray]:
    """The same bytes as rows of each width that an access may have."""
    return {width: data.reshape(-1, width) for width in WIDTHS}


class Memory:
    """Bytes at made-up addresses.

    Args:
        sizes: bytes of each allocation.
        names: what to call them in faults.
        granule: bytes of the narrowest store; races are looked for at that width.
        ordered: sums of floats must come in an order that is the same in every run.
    """

    def __init__(self, sizes: list[int], names: list[str], granule: int, time: Time, *, ordered: bool = False) -> None:
        self.time, self.names, self.starts, top = time, names, [], GUARD
        self.shift, self.ordered = granule.bit_length() - 1, ordered
        for size in sizes:
            self.starts.append(top)
            top += (size + GUARD + 255) // 256 * 256
        self.ends = [start + size for start, size in zip(self.starts, sizes, strict=True)]
        self.data = np.full(top, 0xFF, np.uint8)
        self.rows = rows(self.data)
        count = top >> self.shift
        self.write_block = np.full(count, -1, np.int32)
        self.write_thread, self.write_time = np.zeros((2, count), np.int32)
        self.atomic = np.zeros(count, np.bool_)
        self.read_block = np.full(count, -1, np.int32)
        self.read_thread, self.read_time = np.zeros((2, count), np.int32)
        self.released: dict[int, dict[int, np.ndarray]] = {}  # what an address' atomics have published
        self.version = 0  # of what threads of several blocks wait for

    def address(self, allocation: int) -> int:
        return BASE + self.starts[allocation]

    def bytes_of(self, allocation: int) -> np.ndarray:
        return self.data[self.starts[allocation] : self.ends[allocation]]

    def offsets(self, addresses: np.ndarray, width: int, what: str) -> np.ndarray:
        """Where these addresses lie in ``data``, all of them inside of allocations."""
        offsets = addresses.astype(np.int64) - BASE
        if not len(offsets):
            return offsets
        low, high = int(offsets.min()), int(offsets.max())
        at = bisect.bisect_right(self.starts, low) - 1
        if at < 0 or high + width > self.ends[at]:  # of several allocations, or a fault
            found = np.searchsorted(self.starts, offsets, "right") - 1
            bad = (found < 0) | (offsets + width > np.array(self.ends)[found])
            if bad.any():
                offset = int(offsets[bad][0])
                near = min(
                    range(len(self.starts)), key=lambda i: min(abs(offset - self.starts[i]), abs(offset - self.ends[i]))
                )
                size = self.ends[near] - self.starts[near]
                raise Fault(
                    f"{what} out of bounds: {bad.sum()} threads, byte {offset - self.starts[near]} of "
                    f"{self.names[near]}, which has {size}"
                )
        if (offsets & (width - 1)).any():
            raise Fault(f"{what} of {width} bytes is not aligned")
        return offsets

    def granules(self, offsets: np.ndarray, width: int) -> np.ndarray:
        """(accesses, granules of each)."""
        first = offsets >> self.shift
        return first[:, None] + np.arange(max(width >> self.shift, 1))

    def _conflict(
        self, clocks: Clocks, threads: np.ndarray, block: np.ndarray, thread: np.ndarray, time: np.ndarray
    ) -> str | None:
        """With which earlier accesses these, of a block's ``threads``, are in conflict."""
        others = block >= 0
        if not others.any():
            return None
        me = threads[:, None]
        mine = block == clocks.block
        if (mine & (thread != me) & (time > clocks.seen[me >> 5, thread >> 5])).any():
            return "another thread of its block"
        others &= ~mine
        if others.any():
            warps = np.broadcast_to(me >> 5, block.shape)[others]
            for w, b, t, at in zip(warps, block[others], thread[others] >> 5, time[others], strict=True):
                known = clocks.other_blocks[w].get(int(b))
                if known is None or known[t] < at:
                    return f"program {b}"
        return None

    def note_read(self, clocks: Clocks, offsets: np.ndarray, width: int, threads: np.ndarray, what: str) -> None:
        g = self.granules(offsets, width)
        found = self._conflict(clocks, threads, self.write_block[g], self.write_thread[g], self.write_time[g])
        if found:
            raise Fault(f"{what} races with a write by {found} to {self._name(offsets)}")
        self.read_block[g], self.read_time[g] = clocks.block, self.time.now
        self.read_thread[g] = threads[:, None]

    def note_write(
        self, clocks: Clocks, offsets: np.ndarray, width: int, threads: np.ndarray, what: str, atomic: bool = False
    ) -> None:
        g = self.granules(offsets, width)
        block = self.write_block[g]
        if atomic:
            block = np.where(self.atomic[g], -1, block)  # atomics are in no conflict with each other
        found = self._conflict(clocks, threads, block, self.write_thread[g], self.write_time[g])
        if found:
            raise Fault(f"{what} races with a write by {found} to {self._name(offsets)}")
        found = self._conflict(clocks, threads, self.read_block[g], self.read_thread[g], self.read_time[g])
        if found:
            raise Fault(f"{what} races with a read by {found} of {self._name(offsets)}")
        self.write_block[g], self.write_time[g], self.atomic[g] = clocks.block, self.time.now, atomic
        self.write_thread[g] = threads[:, None]

    def _name(self, offsets: np.ndarray) -> str:
        return self.names[bisect.bisect_right(self.starts, int(offsets[0])) - 1]
