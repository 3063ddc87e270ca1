"""What happened before what: vector clocks of warps, and who last touched each byte.

Time is one counter for a launch. A warp's row of ``seen`` holds, for each warp of its block, the
time up to which that warp's accesses are ordered before its own next one; a barrier joins rows. An
access conflicts with an earlier one by another thread whose time is later than that. An mbarrier
stands as a warp of its own for what bulk copies write: only who waited for it has seen that.
``fenced`` is the same for the asynchronous proxy: what a fence.proxy.async lies behind.

A warp's lanes count as one another's equals only at bar.warp.sync or a barrier, but what one lane
releases through an mbarrier or an atomic is taken to be released by its whole warp.
"""

from dataclasses import dataclass

import numpy as np

MBARRIERS = 64  # of one block


class Time:
    """The launch's counter."""

    def __init__(self) -> None:
        self.now = 1

    def tick(self) -> int:
        self.now += 1
        return self.now - 1


@dataclass
class Snapshot:
    """What a warp knew when it released; snapshots are joined by maximum."""

    seen: np.ndarray
    fenced: np.ndarray
    other_blocks: dict[int, np.ndarray]

    def join(self, other: "Snapshot") -> None:
        np.maximum(self.seen, other.seen, out=self.seen)
        np.maximum(self.fenced, other.fenced, out=self.fenced)
        join_blocks(self.other_blocks, other.other_blocks)


def join_blocks(into: dict[int, np.ndarray], more: dict[int, np.ndarray]) -> None:
    for block, times in more.items():
        into[block] = np.maximum(into[block], times) if block in into else times.copy()


class Clocks:
    """The clocks of a block's warps."""

    def __init__(self, block: int, warps: int, time: Time) -> None:
        self.block, self.warps, self.time = block, warps, time
        self.seen = np.zeros((warps, warps + MBARRIERS), np.int64)
        self.fenced = np.zeros_like(self.seen)
        self.other_blocks: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        self.before_fence: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        self.before_acquire: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        now = time.tick()
        self.seen[:, :warps] = self.fenced[:, :warps] = now

    def release(self, warp: int) -> Snapshot:
        """What is ordered before an arrival of this warp."""
        now = self.time.tick()
        self.seen[warp, warp] = now
        return Snapshot(self.seen[warp].copy(), self.fenced[warp].copy(), dict(self.other_blocks[warp]))

    def acquire(self, warps: slice, snapshot: Snapshot) -> None:
        """Order what was released before what these warps do from now on."""
        own = [(w, self.seen[w, w]) for w in range(warps.start, warps.stop)]
        self.seen[warps] = np.maximum(self.seen[warps], snapshot.seen)
        self.fenced[warps] = np.maximum(self.fenced[warps], snapshot.fenced)
        for warp, before in own:
            self.seen[warp, warp] = before  # its own lanes are no more in step than they were
            join_blocks(self.other_blocks[warp], snapshot.other_blocks)

    def barrier(self, warps: slice, arrived: Snapshot) -> None:
        """These warps wait until all have arrived."""
        self.acquire(warps, arrived)
        for warp in range(warps.start, warps.stop):
            self.seen[warp, warp] = arrived.seen[warp]

    def barrier_alone(self, warps: slice) -> None:
        """All that a barrier waits for are these warps, who are together."""
        now = self.time.tick()
        for known in (self.seen, self.fenced):
            known[warps] = known[warps].max(0)
        self.seen[warps, warps] = now
        first = self.other_blocks[warps.start]
        if any(self.other_blocks[warps]):
            for other in self.other_blocks[warps]:
                join_blocks(first, other)
            for warp in range(warps.start, warps.stop):
                self.other_blocks[warp] = dict(first)

    def warp_sync(self, warps: slice) -> None:
        now = self.time.tick()
        for warp in range(warps.start, warps.stop):
            self.seen[warp, warp] = now

    def fence_proxy(self, warps: slice) -> None:
        now = self.time.tick()
        self.fenced[warps] = np.maximum(self.fenced[warps], self.seen[warps])
        for warp in range(warps.start, warps.stop):
            self.fenced[warp, warp] = now

    def fence(self, warps: slice) -> None:
        """A fence among threads: later relaxed writes release, earlier relaxed reads acquire."""
        for warp in range(warps.start, warps.stop):
            self.learn(warp, self.before_acquire[warp])
            self.before_fence[warp] = self.publish(warp)

    def learn(self, warp: int, published: dict[int, np.ndarray]) -> None:
        """What other blocks, or warps of this one, have published."""
        join_blocks(self.other_blocks[warp], {b: t for b, t in published.items() if b != self.block})
        if self.block in published:
            own = self.seen[warp, warp]
            np.maximum(self.seen[warp, : self.warps], published[self.block], out=self.seen[warp, : self.warps])
            self.seen[warp, warp] = own

    def publish(self, warp: int) -> dict[int, np.ndarray]:
        """What a release to other blocks orders before it."""
        snapshot = self.release(warp)
        return snapshot.other_blocks | {self.block: snapshot.seen[: self.warps]}
