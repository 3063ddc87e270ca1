"""Ends a run that hangs, after every rank has written down where it stands.

A rank that waits for ever stops all others at their next collective, and none can tell who is
missing. So each notes what it is about to do; a thread watches that the notes go on, and passes
them to the others through the process group's store, apart from training's messages.
"""

import contextlib
import datetime
import faulthandler
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from motifarch.errors import tell_torchrun
from motifarch.parallel.launch import World, collective_timeout

STACKS = "stacks"
"""The folder, within a run's, of the ranks' stacks."""

_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
# How long the others may take to write their stacks.
_GRACE_S = 10.0


def limit_collectives(limit_s: float, *, keep: Iterable[dist.ProcessGroup] = ()) -> None:
    """Sets every process group's timeout, those of meshes included, but of the groups to keep."""
    kept = set(keep)
    for group in list(distributed_c10d._world.pg_map):
        if group not in kept:
            distributed_c10d._set_pg_timeout(collective_timeout(limit_s), group)


class Watchdog:
    """While open, ends this process and so the run where nothing goes on for too long.

    Then every rank appends the Python stacks of its threads to `stacks/rank_N.txt` in the run's
    folder, one rank of each node prints a line that names the ranks that never arrived, and all
    exit with status 1, for torchrun to start again. A thread that holds the interpreter's lock
    while it hangs keeps its own rank from writing; the others name it nevertheless.

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
        # A connection of its own: on the shared one, a thread that waits would hold the others up.
        connection = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]  # not in torch's stubs
        self._store = dist.PrefixStore("watchdog", connection)
        self._store.set_timeout(datetime.timedelta(seconds=_GRACE_S))
        self._stage = (0, "the start")
        self._started = False
        self._deadline = time.monotonic() + first_s
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Begins to watch."""
        limit_collectives(self._first_s)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops watching; where a collective has timed out, reports as for a hang and exits."""
        self.stop()
        if error is not None and isinstance(error, RuntimeError) and _TIMED_OUT.search(str(error)):
            self._expire(f"a collective timed out ({str(error).strip().splitlines()[0]})")

    def stop(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def heartbeat(self, stage: str, *, no_timeout: bool = False) -> None:
        """Notes what this rank is about to do, such as "step 5", in all ranks' same order; with
        ``no_timeout`` it may take as long as the first step.
        """
        self._deadline = time.monotonic() + (self._limit_s if self._started and not no_timeout else self._first_s)
        self._stage = (self._stage[0] + 1, stage)

    def first_step_done(self, keep: Sequence[dist.ProcessGroup] = ()) -> None:
        """Ends the first step's patience once all ranks are through it; later calls do nothing."""
        if self._started:
            return
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        # A rank still compiling must not be waited for with the short timeout.
        self._world.all_reduce_sum([1])
        limit_collectives(self._limit_s, keep=keep)
        self._started = True

    def _watch(self) -> None:
        told: tuple[int, str] | None = None
        while not self._closed.wait(min(5.0, self._limit_s / 10)):
            late = time.monotonic() > self._deadline
            with contextlib.suppress(dist.DistError, RuntimeError):  # a store that is gone must not end the watching
                if told != self._stage:
                    told = self._stage
                    self._tell(told)
                late = late or self._store.check(["hung"])
            if late and not self._closed.is_set():
                self._expire("no step finished in time")

    def _tell(self, stage: tuple[int, str]) -> None:
        self._store.set(f"stage/{self._world.rank}", f"{stage[0]} {stage[1]}")

    def _expire(self, reason: str) -> NoReturn:
        """Writes this rank's stacks, says once a node what is known of all ranks, and exits."""
        with self._lock:
            self._write_stacks(reason)
            written = {self._world.rank}
            stages = {self._world.rank: self._stage}
            with contextlib.suppress(dist.DistError, RuntimeError):
                self._tell(self._stage)
                self._store.set(f"written/{self._world.rank}", "")
                self._store.set("hung", "")
                written = self._wait_for_others()
                stages |= self._read_all()
            message = f"error: {self._describe(reason, stages, written)}"
            if self._world.rank == self._speaker(written):
                print(message, file=sys.stderr, flush=True)
            tell_torchrun(message)
            os._exit(1)

    def _write_stacks(self, reason: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            self._folder.mkdir(exist_ok=True)
            with (self._folder / f"rank_{self._world.rank}.txt").open("a", encoding="utf-8") as file:
                file.write(f"{now} rank {self._world.rank} at {self._stage[1]}: {reason}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write("\n")
        except OSError as error:
            print(f"warning: can't write stacks into {self._folder}: {error.strerror}", file=sys.stderr, flush=True)

    def _wait_for_others(self) -> set[int]:
        """Gives the others time to write their stacks; returns who has."""
        until = time.monotonic() + _GRACE_S
        missing = set(range(self._world.size))
        while missing:
            missing -= {rank for rank in missing if self._store.check([f"written/{rank}"])}
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        return set(range(self._world.size)) - missing

    def _read_all(self) -> dict[int, tuple[int, str]]:
        found = {}
        for rank in range(self._world.size):
            key = f"stage/{rank}"
            if self._store.check([key]):
                count, _, text = self._store.get(key).decode().partition(" ")
                found[rank] = (int(count), text)
        return found

    def _describe(self, reason: str, stages: dict[int, tuple[int, str]], written: set[int]) -> str:
        count, place = max(stages.values())
        late = [rank for rank in range(self._world.size) if stages.get(rank, (0, ""))[0] < count]
        if not late:
            return f"{reason}: every rank arrived at {place} and none got past it; their stacks are in {self._folder}"
        seen = sorted({stages[rank][1] for rank in late if rank in stages}) or ["nothing"]
        files = [self._folder / f"rank_{rank}.txt" for rank in late if rank in written]
        stacks = f"stacks: {_few(files)}" if files else "it could not write its stacks"
        return (
            f"{reason}: rank{'s' * (len(late) > 1)} {_few(late)} never arrived at {place} (last seen at "
            f"{', '.join(seen[:4])}); {stacks}; those of the others are beside in {self._folder}"
        )

    def _speaker(self, written: set[int]) -> int:
        """The lowest rank of this node that has written its stacks."""
        first = self._world.rank - int(os.environ.get("LOCAL_RANK", "0"))
        here = range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return min(written & set(here), default=self._world.rank)


def _few(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:8])) + (f" and {len(items) - 8} more" if len(items) > 8 else "")
