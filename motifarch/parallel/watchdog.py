"""Ends a run that hangs, after every rank has written down where it stands.

A rank that waits for ever stops all others at their next collective, and none can tell who is
missing. So each notes what it is about to do, and a thread watches that the notes go on. It decides
by its own clock and waits for nothing: another thread passes the notes on
(`motifarch.parallel.notes`), another writes the stacks.
"""

import datetime
import faulthandler
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from motifarch.errors import tell_torchrun
from motifarch.parallel.launch import World, collective_timeout
from motifarch.parallel.notes import Notes

STACKS = "stacks"
"""The folder, within a run's, of the ranks' stacks."""

_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
# How long all may take to write their stacks and say so.
_GRACE_S = 5.0
# When a store is taken for frozen.
_SILENT_S = 2.0
# How much later than the watchdog's own end a process ends whose interpreter lets no thread run.
_STUCK_S = 3 * _GRACE_S


def limit_collectives(limit_s: float, *, keep: Iterable[dist.ProcessGroup] = ()) -> None:
    """Sets every process group's timeout, those of meshes included, but of the groups to keep."""
    kept = set(keep)
    for group in list(distributed_c10d._world.pg_map):
        if group not in kept:
            distributed_c10d._set_pg_timeout(collective_timeout(limit_s), group)


class Watchdog:
    """While open, ends this process and so the run where nothing goes on for too long.

    Then every rank appends the Python stacks of its threads to `stacks/rank_N.txt` in the run's
    folder, one rank of each node prints a line that names the ranks that never arrived or did not
    answer, and all exit with status 1, for torchrun to start again. A rank whose native code holds
    the interpreter's lock while it hangs ends a little later, with its stacks on standard error.

    Args:
        world: the ranks.
        output: the run's folder.
        first_s: longest time, in seconds, that the first step and long work (saving, validating)
            may take.
        limit_s: longest time, in seconds, between two notes after it.
    """

    def __init__(self, world: World, output: Path, *, first_s: float, limit_s: float) -> None:
        self._world = world
        self._folder = output / STACKS
        self._first_s = first_s
        self._limit_s = limit_s
        self._poll_s = min(1.0, limit_s / 10)
        self._notes = Notes(world.rank, world.size, self._poll_s)
        # Where ranks meet after long work; its timeout stays the long one.
        self._meeting = dist.new_group(backend="gloo")
        self._started = False
        self._deadline = time.monotonic() + first_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Begins to watch."""
        limit_collectives(self._first_s)
        self._notes.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching; where a collective has timed out, reports as for a hang and exits."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        if error is not None and isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
            self._expire(f"a collective timed out ({str(error).strip().splitlines()[0]})")
        self._notes.stop()

    def heartbeat(self, stage: str, *, no_timeout: bool = False) -> None:
        """Notes what this rank is about to do, such as "step 5", in all ranks' same order; with
        ``no_timeout`` it may take as long as the first step.
        """
        self._deadline = time.monotonic() + (self._limit_s if self._started and not no_timeout else self._first_s)
        self._notes.own = (self._notes.own[0] + 1, stage)

    @contextmanager
    def long_work(self, stage: str) -> Iterator[None]:
        """Notes work that may take as long as the first step. At its end all ranks meet: one that
        is through must not wait for the others with the short timeout.
        """
        self.heartbeat(stage, no_timeout=True)
        yield
        dist.all_reduce(torch.zeros(1), group=self._meeting)

    def first_step_done(self, keep: Sequence[dist.ProcessGroup] = ()) -> None:
        """Ends the first step's patience once all ranks are through it; later calls do nothing."""
        if self._started:
            return
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        # A rank still compiling must not be waited for with the short timeout.
        self._world.all_reduce_sum([1])
        limit_collectives(self._limit_s, keep=[*keep, self._meeting])
        self._started = True

    def _watch(self) -> None:
        guarded = 0.0
        try:
            while not self._closed.wait(self._poll_s):
                if guarded != self._deadline:
                    # Needs no interpreter: for native code that holds its lock for ever.
                    guarded = self._deadline
                    left = max(0.0, guarded - time.monotonic()) + _STUCK_S
                    faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
                if self._notes.hung or time.monotonic() > self._deadline:
                    self._expire("no step finished in time")
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _expire(self, reason: str) -> NoReturn:
        """Writes this rank's stacks, says once a node what is known of all ranks, and exits."""
        with self._lock:
            # Neither a file system nor a full pipe may hold the end up.
            end = threading.Timer(2 * _GRACE_S, os._exit, (1,))
            end.daemon = True
            end.start()
            until = time.monotonic() + _GRACE_S
            writer = threading.Thread(target=self._append, args=(self._stacks(reason),), daemon=True)
            writer.start()
            writer.join(_GRACE_S)
            self._notes.tell_hung(until, written=not writer.is_alive())
            if self._notes.reached.wait(_SILENT_S):
                self._notes.collected.wait(until + 1 - time.monotonic())
            message = f"error: {self._describe(reason)}"
            tell_torchrun(message)
            if self._world.rank == self._speaker():
                print(message, file=sys.stderr, flush=True)
            os._exit(1)

    def _stacks(self, reason: str) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        # By way of a local file: faulthandler writes while it holds the interpreter's lock.
        with tempfile.TemporaryFile() as file:
            file.write(f"{now} rank {self._world.rank} at {self._notes.own[1]}: {reason}\n\n".encode())
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            return file.read() + b"\n"

    def _append(self, stacks: bytes) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            with (self._folder / f"rank_{self._world.rank}.txt").open("ab") as file:
                file.write(stacks)
        except OSError as error:
            print(f"warning: can't write stacks into {self._folder}: {error.strerror}", file=sys.stderr, flush=True)

    def _describe(self, reason: str) -> str:
        rank, size, notes = self._world.rank, self._world.size, self._notes
        stages = notes.stages | {rank: notes.own}
        silent = [other for other in range(size) if other != rank and other not in notes.written]
        unanswered = f"; {_ranks(silent)} did not answer" if silent else ""
        if len(silent) == size - 1 > 0 and not notes.stages:
            return (
                f"{reason}: rank {rank} is at {notes.own[1]}{unanswered}, nor did the store that carries the ranks' "
                f"notes: its host, torchrun of the first node, is frozen or gone; the stacks are in {self._folder}"
            )
        count, place = max(stages.values())
        late = [other for other in range(size) if stages.get(other, (0, ""))[0] < count]
        if not late:
            arrived = f"every rank arrived at {place} and none got past it"
            return f"{reason}: {arrived}{unanswered}; their stacks are in {self._folder}"
        seen = sorted({stages[other][1] for other in late if other in stages}) or ["nothing"]
        files = [self._folder / f"rank_{other}.txt" for other in late if other not in silent]
        stacks = f"; stacks: {_few(files)}" if files else ""
        return (
            f"{reason}: {_ranks(late)} never arrived at {place} (last seen at {', '.join(seen[:4])}){stacks}"
            f"{unanswered}; the stacks of the others are in {self._folder}"
        )

    def _speaker(self) -> int:
        """The lowest rank of this node that has written its stacks."""
        first = self._world.rank - int(os.environ.get("LOCAL_RANK", "0"))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return min({self._world.rank, *self._notes.written} & set(here), default=self._world.rank)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_few(ranks)}"


def _few(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
