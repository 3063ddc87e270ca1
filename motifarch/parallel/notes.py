"""What ranks note of where they stand, passed on through the process group's store."""

import contextlib
import datetime
import threading
import time

import torch.distributed as dist
from torch.distributed import distributed_c10d


class Notes:
    """This rank's note, and what has arrived of the others'.

    Only a thread of its own talks to the store: one whose host is frozen never answers. Who reads
    the attributes never waits.

    Args:
        rank: this process's number.
        size: how many there are.
        poll_s: seconds between two looks at the store.
    """

    own: tuple[int, str] = (0, "the start")
    """How many stages this rank has come to, and the last one."""
    hung: bool = False
    """Whether some rank has given the run up."""

    def __init__(self, rank: int, size: int, poll_s: float) -> None:
        self.stages: dict[int, tuple[int, str]] = {}
        """The ranks' notes, as far as they have been read; only after `tell_hung`."""
        self.written: set[int] = set()
        """The ranks that have answered `tell_hung`, after writing their stacks."""
        self.reached = threading.Event()
        """Whether the store has answered since."""
        self.collected = threading.Event()
        """Whether everything that can be known is."""
        self._rank, self._size, self._poll_s = rank, size, poll_s
        self._shared = distributed_c10d._get_default_store()
        self._wake = threading.Event()
        self._until: float | None = None
        self._has_written = False
        self._thread = threading.Thread(target=self._run, name="notes", daemon=True)

    def start(self) -> None:
        """Begins to pass notes on."""
        self._thread.start()

    def stop(self) -> None:
        """Ends that."""
        self._wake.set()

    def tell_hung(self, until: float, *, written: bool) -> None:
        """Tells all ranks to give up, and whether this one has written its stacks; collects their
        answers until a time of time.monotonic.
        """
        self._until, self._has_written = until, written
        self._wake.set()

    def _run(self) -> None:
        # Errors: a store that is gone must not end the watching.
        with contextlib.suppress(dist.DistError, RuntimeError):
            # A connection of its own: on the shared one, who waits would hold the others up.
            store = dist.PrefixStore("watchdog", self._shared.clone())  # type: ignore[attr-defined]  # not in torch's stubs
            store.set_timeout(datetime.timedelta(seconds=10))
            told = None
            while not self._wake.wait(self._poll_s):
                with contextlib.suppress(dist.DistError, RuntimeError):
                    if told != self.own:
                        told = self.own
                        self._tell(store)
                    self.hung = store.check(["hung"])
            if self._until is not None:
                self._collect(store, self._until)
        self.collected.set()

    def _tell(self, store: dist.Store) -> None:
        count, stage = self.own
        store.set(f"stage/{self._rank}", f"{count} {stage}")

    def _collect(self, store: dist.Store, until: float) -> None:
        self._tell(store)
        if self._has_written:
            store.set(f"written/{self._rank}", "")
        store.set("hung", "")
        store.check(["hung"])  # what is set is not confirmed
        self.reached.set()
        everyone = [f"written/{rank}" for rank in range(self._size)]
        while not store.check(everyone) and time.monotonic() < until:
            time.sleep(0.05)
        for rank, key in enumerate(everyone):
            if store.check([f"stage/{rank}"]):
                count, _, stage = store.get(f"stage/{rank}").decode().partition(" ")
                self.stages[rank] = (int(count), stage)
            if store.check([key]):
                self.written.add(rank)
