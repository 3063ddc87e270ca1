"""Copies of a run's checkpoints in object storage, made in the background.

The run keeps its folder on disk, for logs, locks and the first copy of each checkpoint. What is
complete there is copied: every rank its own files, and rank 0, once all of them have arrived, the
manifest. A server that is gone costs copies, and neither the run nor what is on disk.
"""

import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from motifarch.storage import storage_reason
from motifarch.train.manifest import MANIFEST, read_manifest, step_of
from motifarch.train.remote_run import RemoteRun
from motifarch.train.run_folder import METRICS, RECORD

IDLE, BUSY, FAILING = range(3)
"""What a rank's part of a copy is doing."""

POLL_S = 0.5
"""Seconds between two looks at what others have copied."""
WAITS_S = (1.0, 4.0, 15.0, 60.0)
"""Seconds before a failed copy is tried again; the last one from there on."""
PATIENCE_S = 30.0
"""Seconds between attempts that the end of a run still waits for a copy that fails."""


class Mirror:
    """This rank's part of the copies; one checkpoint at a time is under way."""

    def __init__(self, url: str, *, keep_last: int, group: dist.ProcessGroup, say: Callable[[str], None]) -> None:
        """Opens the storage.

        Args:
            url: the run's folder there.
            keep_last: complete checkpoints kept there; 0 keeps all.
            group: of all ranks, for small messages on the CPU.
            say: told of failures, by any rank.
        """
        self._remote = RemoteRun(url)
        self._keep_last = keep_last
        self._group = group
        self._say = say
        self._state = IDLE
        self._stop = threading.Event()
        self.checkpoint: Path | None = None
        """What is being copied or was last; the same on all ranks."""

    @property
    def in_use(self) -> Path | None:
        """The checkpoint on disk that must stay, for it is being copied."""
        return None if self._state == IDLE else self.checkpoint

    def state(self) -> int:
        """The state of the rank that is furthest from done, collectively."""
        worst = torch.tensor([self._state])
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self._group)
        return int(worst)

    def begin(self, checkpoint: Path) -> None:
        """Begins to copy a complete checkpoint, on all ranks; a copy that fails is given up."""
        self._stop.set()
        self.checkpoint, self._state, self._stop = checkpoint, BUSY, threading.Event()
        # A daemon: a server that does not answer holds no process up that ends for another reason.
        threading.Thread(target=self._copy, args=(checkpoint, self._stop), name="mirror", daemon=True).start()

    def finish(self, checkpoint: Path, heartbeat: Callable[[], None]) -> None:
        """Waits until a run's last checkpoint is there, or can't be; all ranks together.

        `heartbeat` is called again and again meanwhile.
        """
        failing = 0.0
        while True:
            state = self.state()
            if state == IDLE and self.checkpoint == checkpoint:
                break
            if state == IDLE:
                self.begin(checkpoint)
            failing += POLL_S * (state == FAILING)
            if failing > PATIENCE_S:
                self._stop.set()
                if dist.get_rank(self._group) == 0:
                    self._say(
                        f"warning: {checkpoint} is complete, but not copied to {self._remote.url}; once that can be "
                        "written to, the same command copies it"
                    )
                return
            heartbeat()
            self._stop.wait(POLL_S)
        if dist.get_rank(self._group) == 0:
            try:
                self._put_record(checkpoint)
            except Exception as error:
                self._say(f"warning: {RECORD} can't be copied to {self._remote.url}: {storage_reason(error)}")

    def _copy(self, checkpoint: Path, stop: threading.Event) -> None:
        done: set[str] = set()
        attempt = 0
        while not stop.is_set():
            try:
                self._try_to_copy(checkpoint, done, stop)
            except Exception as error:
                if stop.is_set():
                    return
                wait = WAITS_S[min(attempt, len(WAITS_S) - 1)]
                attempt += 1
                self._state = FAILING
                self._say(
                    f"warning: rank {dist.get_rank(self._group)} can't copy {checkpoint} to {self._remote.url}: "
                    f"{storage_reason(error)}. It stays on disk and is tried again in {wait:g} s"
                )
                if not stop.wait(wait):
                    self._state = BUSY
            else:
                if not stop.is_set():
                    if attempt:
                        self._say(f"{checkpoint} is in {self._remote.url} now")
                    self._state = IDLE
                return

    def _try_to_copy(self, checkpoint: Path, done: set[str], stop: threading.Event) -> None:
        step = step_of(checkpoint) or 0
        folder = f"checkpoints/{checkpoint.name}"
        rank, ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        files = read_manifest(checkpoint)["files"]
        if MANIFEST in self._remote.checkpoints().get(step, {}):  # of a start before this one
            return
        for name in files:
            if _writer(name) % ranks == rank and name not in done and not stop.is_set():
                self._remote.put(checkpoint / name, f"{folder}/{name}")
                done.add(name)
        if rank:
            return
        # The others' files: what lay there of an earlier save was removed before the run began.
        while not stop.is_set():
            there = self._remote.checkpoints().get(step, {})
            if all(there.get(name) == about["size"] for name, about in files.items()):
                break
            stop.wait(POLL_S)
        if stop.is_set():
            return
        self._put_record(checkpoint)
        self._remote.put(checkpoint / MANIFEST, f"{folder}/{MANIFEST}")
        self._remote.prune(self._keep_last, step)

    def _put_record(self, checkpoint: Path) -> None:
        for name in (RECORD, METRICS):
            if (file := checkpoint.parent.parent / name).exists():
                self._remote.put(file, name)


def _writer(name: str) -> int:
    """The rank that has written a checkpoint's file, `__RANK_NUMBER.distcp`; 0 for the rest."""
    number = name.removeprefix("__").partition("_")[0]
    return int(number) if number.isdecimal() else 0
