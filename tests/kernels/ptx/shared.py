"""A block's shared memory, and what may go wrong in it: races, reads of what is not there yet,
overwriting what is still read.
"""

import numpy as np

from tests.kernels.ptx.memory import rows
from tests.kernels.ptx.ordering import Clocks
from tests.kernels.ptx.program import Fault

BASE = 1024  # where a block's shared memory begins; address 0 is nobody's
SEVERAL = 255  # lanes


class Shared:
    """Shared memory of ``size`` bytes.

    Args:
        granule: bytes of the narrowest store; races are looked for at that width.
    """

    def __init__(self, size: int, granule: int, warps: int) -> None:
        self.limit, self.shift, self.threads = BASE + size, granule.bit_length() - 1, 32 * warps
        top = (self.limit + 1023) // 1024 * 1024
        self.data = np.zeros(top, np.uint8)
        self.rows = rows(self.data)
        count = top >> self.shift
        self.write_time = np.zeros(count, np.int32)
        self.writer = np.zeros(count, np.int32)  # a thread, or threads + 32 * an mbarrier's number
        self.read_time = np.zeros((warps, count), np.int32)
        self.read_lane = np.zeros((warps, count), np.uint8)
        self.copying = np.zeros(count, np.bool_)  # by cp.async, until it is waited for
        self.in_use = np.zeros(count, np.int16)  # by a wgmma or a bulk store, until it is waited for
        self.clocks: Clocks

    def reset(self, clocks: Clocks) -> None:
        """For another block."""
        self.clocks = clocks
        self.data[:] = 0xFF  # NaN in every format
        for array in (self.write_time, self.read_time, self.copying, self.in_use):
            array[:] = 0

    def granules(self, addresses: np.ndarray, width: int, what: str) -> np.ndarray:
        """(accesses, granules of each), all of them in shared memory and aligned."""
        if addresses.min() < BASE or addresses.max() + width > self.limit:
            outside = addresses[(addresses < BASE) | (addresses + width > self.limit)]
            raise Fault(f"{what} outside of shared memory: byte {outside[0] - BASE} of {self.limit - BASE}")
        if (addresses & (width - 1)).any():
            raise Fault(f"{what} of {width} bytes is not aligned")
        first = addresses >> self.shift
        return first[:, None] + np.arange(max(width >> self.shift, 1))

    # --- Threads ----------------------------------------------------------------------------------

    def note_read(self, g: np.ndarray, threads: np.ndarray, what: str) -> None:
        """Threads, one a row of ``g``, read."""
        self.check_written(g, threads[:, None], what)
        warps, lanes = threads[:, None] >> 5, threads[:, None] & 31
        seen = self.clocks.seen[warps, warps]
        earlier, lane = self.read_time[warps, g], self.read_lane[warps, g]
        self.read_lane[warps, g] = np.where((earlier > seen) & (lane != lanes), SEVERAL, lanes)
        self.read_time[warps, g] = self.clocks.time.now
        lost = self.read_lane[warps, g] != lanes  # several lanes of this very access, or earlier ones
        if lost.any():
            self.read_lane[np.broadcast_to(warps, g.shape)[lost], g[lost]] = SEVERAL

    def check_written(self, g: np.ndarray, threads: np.ndarray, what: str) -> None:
        """A read by ``threads`` (broadcast against g) sees what was written."""
        if self.copying[g].any():
            raise Fault(f"{what} of bytes whose cp.async was not waited for{self._at(g, self.copying[g])}")
        writer = self.writer[g]
        bad = (self.write_time[g] > self.clocks.seen[threads >> 5, writer >> 5]) & (writer != threads)
        if bad.any():
            bulk = writer[bad][0] >= self.threads
            by = "a bulk copy whose mbarrier was not waited for" if bulk else f"thread {writer[bad][0]}"
            raise Fault(f"{what} races with a write by {by}{self._at(g, bad)}")

    def note_write(self, g: np.ndarray, threads: np.ndarray, same: np.ndarray | None, what: str) -> None:
        """Threads, one a row of ``g``, write; ``same`` says which granules keep their value."""
        me = threads[:, None]
        self.check_free(g, what)
        writer = self.writer[g]
        bad = (self.write_time[g] > self.clocks.seen[me >> 5, writer >> 5]) & (writer != me)
        if same is not None:
            bad &= ~same
        if bad.any():
            raise Fault(f"{what} races with a write by thread {writer[bad][0]}{self._at(g, bad)}")
        self.check_read(g, me, what)
        self.write_time[g], self.writer[g] = self.clocks.time.now, np.broadcast_to(me, g.shape)

    def check_free(self, g: np.ndarray, what: str) -> None:
        """No asynchronous operation is at work there."""
        if self.in_use[g].any():
            raise Fault(
                f"{what} to bytes that an unfinished wgmma or bulk store reads{self._at(g, self.in_use[g] > 0)}"
            )
        if self.copying[g].any():
            raise Fault(f"{what} to bytes of a cp.async that was not waited for{self._at(g, self.copying[g])}")

    def check_read(self, g: np.ndarray, threads: np.ndarray, what: str) -> None:
        """All earlier reads are ordered before a write by ``threads`` (broadcast against g)."""
        warps, lanes = threads >> 5, threads & 31
        times = self.read_time[:, g]  # (warps, *g.shape)
        newest = times.max(0)
        known = self.clocks.seen[:, : len(times)]
        if newest.max() <= known[warps].min():
            return
        for other, time in enumerate(times):
            bad = time > known[warps, other]
            if bad.any():
                bad &= (other != warps) | (self.read_lane[other, g] != lanes)
                if bad.any():
                    raise Fault(f"{what} races with a read by warp {other}{self._at(g, bad)}")

    # --- Warps and the asynchronous proxy ---------------------------------------------------------

    def note_warp_read(self, g: np.ndarray, warps: np.ndarray, what: str) -> None:
        """Whole warps (broadcast against g) read, as by ldmatrix."""
        if self.copying[g].any():
            raise Fault(f"{what} of bytes whose cp.async was not waited for{self._at(g, self.copying[g])}")
        writer = self.writer[g] >> 5
        bad = self.write_time[g] > self.clocks.seen[warps, writer]
        if bad.any():
            raise Fault(f"{what} races with a write by warp {writer[bad][0]}{self._at(g, bad)}")
        self.read_time[warps, g], self.read_lane[warps, g] = self.clocks.time.now, SEVERAL

    def begin_async_read(self, g: np.ndarray, warps: slice, what: str) -> None:
        """The asynchronous proxy begins to read the granules ``g`` for these warps."""
        if self.copying[g].any():
            raise Fault(f"{what} of bytes whose cp.async was not waited for{self._at(g, self.copying[g])}")
        writer = self.writer[g] >> 5
        time = self.write_time[g]
        bad = time > self.clocks.seen[warps].min(0)[writer]
        if bad.any():
            bulk = writer[bad][0] >= self.clocks.warps
            by = "a bulk copy whose mbarrier was not waited for" if bulk else f"warp {writer[bad][0]}"
            raise Fault(f"{what} races with a write by {by}{self._at(g, bad)}")
        bad = time > self.clocks.fenced[warps].min(0)[writer]
        if bad.any():
            raise Fault(f"{what} of bytes written without a fence for the asynchronous proxy{self._at(g, bad)}")
        self.in_use[g] += 1

    def end_async_read(self, g: np.ndarray, warps: slice) -> None:
        """It was waited for, by these warps."""
        self.in_use[g] -= 1
        for warp in range(warps.start, warps.stop):
            self.read_time[warp, g], self.read_lane[warp, g] = self.clocks.time.now, SEVERAL

    def note_bulk_write(self, g: np.ndarray, thread: int, writer: int, what: str) -> None:
        """A bulk copy, issued by a thread, writes on behalf of ``writer``."""
        self.check_free(g, what)
        owner = self.writer[g]
        bad = (self.write_time[g] > self.clocks.fenced[thread >> 5, owner >> 5]) & (owner != writer)
        if bad.any():
            raise Fault(
                f"{what} races with a write by thread {owner[bad][0]}, or is not fenced from it{self._at(g, bad)}"
            )
        self.check_read(g, np.array([thread]), what)
        self.write_time[g], self.writer[g] = self.clocks.time.now, writer

    def _at(self, g: np.ndarray, bad: np.ndarray) -> str:
        return f", at byte {(int(g[np.broadcast_to(bad, g.shape)][0]) << self.shift) - BASE} of shared memory"
