"""Checkpoints: sharded, written in the background, and counted only once complete.

A save writes into `step_N.partial`: each rank its own shard (hashed as soon as it is written), then
rank 0 the metadata and the manifest, and renames the folder to `step_N`. Killed at any instant,
what was complete stays so.
"""

import errno
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as TorchFuture

from motifarch.checkpoint_reader import METADATA, CheckpointReader
from motifarch.errors import UserError, first_line
from motifarch.files import os_error, remove, sha256, write_json
from motifarch.ledger.tensor_hash import TensorPart
from motifarch.optim import SpikeGuard
from motifarch.train.finite import first_nonfinite
from motifarch.train.lineage import LINK, AverageLineage, Lineage
from motifarch.train.manifest import (
    PARTIAL,
    checkpoint_name,
    checkpoints_folder,
    damage,
    find_newest,
    list_checkpoints,
    prune,
    remove_checkpoint,
    write_manifest,
)
from motifarch.train.mirror import BUSY, Mirror
from motifarch.train.saved_hashes import HASHES, HashingPlanner, joined_hashes, roots

__all__ = ["CheckpointWriter", "Checkpointer", "TrainState", "find_newest", "load_model_state", "load_state"]


@dataclass
class TrainState:
    """Everything that a step changes, and so all that a checkpoint holds."""

    model: nn.Module
    """Sharded."""
    optimizer: torch.optim.Optimizer
    step: int = 0
    """Optimizer steps done; decides the next step's data, rate and batch size."""
    tokens: int = 0
    """Targets trained on so far, over all ranks."""
    nonfinite: torch.Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.int64))
    """Skipped steps, on the device: in all, in a row up to now, and the longest row."""
    spike_guard: SpikeGuard | None = None
    """The guard against steps whose loss or gradient norm jumps, if the run has one."""

    def count_skipped(self, skipped: torch.Tensor) -> None:
        """Adds a step to `nonfinite` without waiting for the device; `skipped` is 1 or 0."""
        total, row, longest = self.nonfinite.unbind()
        bad = skipped.to(torch.int64)
        row = (row + bad) * bad
        self.nonfinite = torch.stack([total + bad, row, torch.maximum(longest, row)])

    def state_dict(self) -> dict[str, Any]:
        """The state as torch.distributed.checkpoint takes it, keyed by full parameter names."""
        progress: dict[str, Any] = {"step": self.step, "tokens": self.tokens, "nonfinite": self.nonfinite}
        if self.spike_guard is not None:
            progress["spike_guard"] = self.spike_guard.state_dict()
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer)["state"],
            "progress": progress,
        }


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    """What a rank reports of a tensor: the size and hash of its file, and its own hashes."""

    file_size: int = 0
    file_sha256: str = ""
    part: TensorPart | None = None


class CheckpointWriter(FileSystemWriter):
    """Writes a checkpoint's files, then the manifest, and renames the whole folder."""

    def __init__(
        self, final: Path, step: int, about: dict[str, Any], lineage: Lineage | AverageLineage | None = None
    ) -> None:
        """The folder that it becomes, its step and notes; on rank 0 the ledger it goes into."""
        super().__init__(final.with_name(final.name + PARTIAL))
        self.folder = final.with_name(final.name + PARTIAL)
        self.final = final
        self.step = step
        self.about = about
        self.lineage = lineage

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        hashing = HashingPlanner(planner)
        try:
            results: list[WriteResult] = super().write_data(plan, hashing).wait()  # type: ignore[arg-type]
            names = {result.storage_data.relative_path for result in results}
            files = {name: ((self.folder / name).stat().st_size, sha256(self.folder / name)) for name in names}
            hashing.finish()
        except Exception as error:
            raise _explained(error, self.folder) from None
        done: TorchFuture[list[WriteResult]] = TorchFuture()
        done.set_result(
            [
                _HashedResult(
                    r.index,
                    r.size_in_bytes,
                    r.storage_data,
                    *files[r.storage_data.relative_path],
                    hashing.parts.get(r.index),
                )
                for r in results
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        try:
            super().finish(metadata, results)
            files = {
                r.storage_data.relative_path: {"size": r.file_size, "sha256": r.file_sha256}
                for rank_results in results
                for r in rank_results
                if isinstance(r, _HashedResult)
            }
            hashes = joined_hashes(
                (r.index.fqn, r.part)
                for rank_results in results
                for r in rank_results
                if isinstance(r, _HashedResult) and r.part is not None
            )
            write_json(self.folder / HASHES, hashes)
            for extra in (self.folder / METADATA, self.folder / HASHES):
                files[extra.name] = {"size": extra.stat().st_size, "sha256": sha256(extra)}
            about = self.about
            if self.lineage is not None:
                about = about | {LINK: self.lineage.link(self.step, roots(hashes))}
            write_manifest(self.folder, step=self.step, about=about, files=files)
            # The partial folder counts from here on: an older checkpoint of the same step can go.
            remove_checkpoint(self.final)
            self.folder.rename(self.final)
            if self.lineage is not None:
                self.lineage.saved(self.final)
        except Exception as error:
            raise _explained(error, self.folder) from None


def _explained(error: Exception, folder: Path) -> Exception:
    """The operating system's reason, which torch's zip writer hides."""
    if isinstance(error, UserError):  # of the planner, which reads while it writes a mean
        return error
    if cause := os_error(error):
        return OSError(cause.errno, cause.strerror, str(folder))
    return OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}", str(folder))


class Checkpointer:
    """Saves a run's states, one at a time, in the background or not.

    Every method is called by all ranks alike.
    """

    def __init__(
        self,
        output: Path,
        *,
        keep_last: int = 2,
        asynchronous: bool = True,
        about: Callable[[int], dict[str, Any]] | None = None,
        saved_step: int | None = None,
        mirror: str | None = None,
        lineage: Lineage | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Makes the process group of the saves, collectively.

        The last `keep_last` complete checkpoints are kept (0 keeps all). `about` gives what
        the manifest notes of the run at a step; `saved_step` is in the output folder already.
        On rank 0, `lineage` is the ledger that they go into. Complete checkpoints are copied to
        the URL `mirror`; `say` is told where that fails.
        """
        self.output = output
        self.keep_last = keep_last
        self.asynchronous = asynchronous
        self.about = about or (lambda step: {})
        # A group of its own: on the default one, the saves' messages would mix with training's.
        self.group = dist.new_group(backend="gloo")
        self._pending: Future[None] | None = None
        self._saved_step = saved_step
        self._say = say
        self._lineage = lineage
        self._mirror = Mirror(mirror, keep_last=keep_last, group=self.group, say=say) if mirror else None

    def save(self, state: TrainState) -> None:
        """Saves a state, after the previous save; waits for this one too when not asynchronous.

        Raises:
            UserError: this save or the previous one failed, on any rank, or the state is not
                finite: it is not saved then, and the checkpoints before it stay.
        """
        self.wait()
        if self._saved_step == state.step:
            return
        final = checkpoints_folder(self.output) / checkpoint_name(state.step)
        writer = CheckpointWriter(final, state.step, self.about(state.step), self._lineage)
        content = state.state_dict()
        if bad := first_nonfinite({name: content[name] for name in ("model", "optimizer")}, self.group):
            raise UserError(
                f"{bad} is not finite after step {state.step}, so nothing is saved; {self._kept()}. Lower optim.lr, "
                "set optim.clip or look into the data; the same command resumes from the newest complete checkpoint"
            )
        self._saved_step = state.step
        copy = self._may_copy(final)
        if dist.get_rank() == 0:
            with suppress(OSError):  # an earlier save of this step, cut short, makes way
                remove(writer.folder)
        dist.barrier(self.group)
        if self.asynchronous:
            # This stager copies CPU tensors too: training may change them while they are written.
            stager = DefaultStager(StagingOptions(False, False, False, False))
            saved = dcp.async_save(content, storage_writer=writer, process_group=self.group, async_stager=stager)
            assert isinstance(saved, Future)
            self._pending = Future()
            saved.add_done_callback(partial(self._finish, self._pending, final, stager, copy))
        else:
            saved = Future()
            try:
                saved.set_result(dcp.save(content, storage_writer=writer, process_group=self.group))
            except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
                saved.set_exception(error)
            self._pending = Future()
            self._finish(self._pending, final, None, copy, saved)
            self.wait()

    def _may_copy(self, final: Path) -> bool:
        """Whether a save that begins is to be copied too: not while an earlier copy goes on."""
        if self._mirror is None:
            return False
        if self._mirror.state() != BUSY:
            return True
        if dist.get_rank() == 0:
            self._say(f"{final.name} is not copied to checkpoint.mirror, for an earlier checkpoint still is")
        return False

    def finish(self, heartbeat: Callable[[], None] = lambda: None) -> None:
        """Waits until the last save is copied too, or until that has failed for a while, which
        `say` is told; `heartbeat` is called again and again meanwhile.

        Raises:
            UserError: as `wait`.
        """
        self.wait()
        if self._mirror and self._saved_step is not None:
            self._mirror.finish(checkpoints_folder(self.output) / checkpoint_name(self._saved_step), heartbeat)

    def _finish(
        self, pending: Future[None], final: Path, stager: DefaultStager | None, copy: bool, saved: Future[Any]
    ) -> None:
        """Ends a save, in the thread that ran it."""
        try:
            if stager:
                stager.close()
            saved.result()
            if copy and self._mirror:
                self._mirror.begin(final)
            if dist.get_rank() == 0:
                prune(self.output, self.keep_last, final, in_use=self._mirror.in_use if self._mirror else None)
            pending.set_result(None)
        except BaseException as error:
            pending.set_exception(error)

    @property
    def failed(self) -> bool:
        """Whether the background save has failed; the next `wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Waits until the last save is complete.

        Raises:
            UserError: it failed, on any rank.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        if error is not None:
            raise UserError(self._explain(error)) from None

    def _explain(self, error: BaseException) -> str:
        failures = error.failures if isinstance(error, dcp.CheckpointException) else {0: (error, None)}
        rank, (cause, _) = min(failures.items())
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
        return (
            f"the checkpoint of step {self._saved_step} can't be saved into {checkpoints_folder(self.output)} (rank "
            f"{rank}): {reason}; {self._kept()}. Make room or mend that, and start the same command again to resume"
        )

    def _kept(self) -> str:
        complete = [p.name for p in list_checkpoints(self.output) if damage(p, hashes=False) is None]
        return f"complete and untouched: {', '.join(complete)}" if complete else "no checkpoint was complete before it"


def load_state(checkpoint: Path, state: TrainState) -> None:
    """Loads a checkpoint into a sharded state, in place; the saving run may have had other ranks.

    Model and optimizer are built as for the saving run. The optimizer keeps its own
    hyperparameters: a checkpoint holds moments only.

    Raises:
        UserError: the checkpoint does not fit the model, can't be read, or is not finite.
    """
    # Reading the state creates the moments, into which the load writes.
    content = state.state_dict()
    reader = CheckpointReader(checkpoint)
    guard = state.spike_guard
    if guard is not None:
        saved = reader.tensors.get("progress.spike_guard.history")
        if saved is None or saved.size != guard.history.shape:
            # The run had no guard before, or one with another window: this one starts afresh.
            del content["progress"]["spike_guard"]
    reader.load(content)
    _check_finite(checkpoint, {name: content[name] for name in ("model", "optimizer")}, dist.group.WORLD)
    set_model_state_dict(state.model, content["model"])
    groups = get_optimizer_state_dict(state.model, state.optimizer)["param_groups"]
    set_optimizer_state_dict(
        state.model, state.optimizer, optim_state_dict={"state": content["optimizer"], "param_groups": groups}
    )
    progress = content["progress"]
    state.step, state.tokens = int(progress["step"]), int(progress["tokens"])
    state.nonfinite = progress["nonfinite"].to(state.nonfinite.device)
    if guard is not None and "spike_guard" in progress:
        guard.load_state_dict(progress["spike_guard"])


def load_model_state(checkpoint: Path, model: nn.Module) -> None:
    """Loads a checkpoint's weights into a whole model built from the run's config.

    One process does it, without a process group.

    Raises:
        UserError: the checkpoint is incomplete, damaged or not finite, or does not fit the model.
    """
    checkpoint = Path(checkpoint)
    if reason := damage(checkpoint):
        raise UserError(f"the checkpoint {checkpoint} can't be used: {reason}")
    content = {"model": get_model_state_dict(model)}
    CheckpointReader(checkpoint).load(content, no_dist=True)
    _check_finite(checkpoint, content, None)
    set_model_state_dict(model, content["model"], options=StateDictOptions(strict=True))


def _check_finite(checkpoint: Path, content: dict[str, Any], group: dist.ProcessGroup | None) -> None:
    if bad := first_nonfinite(content, group):
        raise UserError(
            f"the checkpoint {checkpoint} can't be used: its {bad} is not finite; remove it to go on from the one "
            "before it, or name another"
        )
