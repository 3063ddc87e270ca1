"""A run's folder in object storage: its record, its figures and its checkpoints.

It is laid out as on disk. An object appears whole or not at all, but nothing can be renamed: a
checkpoint counts once its manifest is there, which is written last and removed first.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from motifarch.errors import UserError
from motifarch.files import remove
from motifarch.storage import explained, filesystem
from motifarch.train.manifest import (
    MANIFEST,
    PARTIAL,
    NewerFormatError,
    checkpoint_name,
    checkpoints_folder,
    damage,
    read_manifest,
    remove_checkpoint,
    step_of,
)
from motifarch.train.run_folder import METRICS, RECORD

THREADS = 8
"""Files that are copied at the same time."""

Warn = Callable[[str], object]


class RemoteRun:
    """A run's folder by its URL, or one checkpoint's within it."""

    def __init__(self, url: str) -> None:
        """Opens the file system; the server is not asked yet.

        Raises:
            UserError: as `motifarch.storage.filesystem`.
        """
        self.url = url.rstrip("/")
        self.only = step_of(Path(self.url))
        """The step of the one checkpoint that the URL names, if it does."""
        if self.only is not None:
            self.url = self.url.rpartition("/")[0].removesuffix("/checkpoints")
        self.fs, self.root = filesystem(self.url)
        self.root = self.root.rstrip("/")

    def name(self, step: int) -> str:
        """A checkpoint's URL."""
        return f"{self.url}/checkpoints/{checkpoint_name(step)}"

    def checkpoints(self) -> dict[int, dict[str, int]]:
        """Each step's files, by name, with their sizes in bytes; newest first, complete or not."""
        folder = f"{self.root}/checkpoints"
        self.fs.invalidate_cache()
        found: dict[int, dict[str, int]] = {}
        for path, info in self.fs.find(folder, detail=True).items():
            where, _, file = path.removeprefix(folder).strip("/").partition("/")
            step = step_of(Path(where))
            if step is not None and where == checkpoint_name(step) and self.only in (None, step):
                found.setdefault(step, {})[file] = info["size"]
        return dict(sorted(found.items(), reverse=True))

    def complete(self) -> list[int]:
        """The steps of checkpoints that have a manifest, newest first."""
        return [step for step, files in self.checkpoints().items() if MANIFEST in files]

    def put(self, source: Path, name: str) -> None:
        """Copies a file into the run's folder."""
        self.fs.put_file(str(source), f"{self.root}/{name}")

    def remove(self, step: int, files: dict[str, int]) -> None:
        """Deletes a checkpoint, its manifest first, so that what is left never looks complete."""
        folder = f"{self.root}/checkpoints/{checkpoint_name(step)}"
        for name in sorted(files, key=lambda name: name != MANIFEST):
            with suppress(FileNotFoundError):
                self.fs.rm_file(f"{folder}/{name}")
        with suppress(OSError, NotImplementedError):  # only disks have folders
            self.fs.rmdir(folder)

    def prune(self, keep_last: int, newest: int) -> None:
        """Deletes as `motifarch.train.manifest.prune` does on disk."""
        kept = {newest}
        for step, files in self.checkpoints().items():
            if step >= newest:
                continue
            if MANIFEST in files and (not keep_last or len(kept) < keep_last):
                kept.add(step)
            elif MANIFEST not in files or not self._is_of_newer_format(step):
                self.remove(step, files)

    def claim(self, step: int) -> None:
        """Makes sure that the run may write here, and removes what saves after `step` have left.

        Raises:
            UserError: it may not, or the server can't be reached.
        """
        with explained(self.url):
            probe = f"{self.root}/.write_test"
            self.fs.pipe_file(probe, b"")
            self.fs.rm_file(probe)
            for later, files in self.checkpoints().items():
                if later > step:
                    self.remove(later, files)

    def fetch(self, step: int, output: Path) -> Path:
        """Copies a checkpoint into a run's folder on disk, where it counts once it is whole.

        Raises:
            NewerFormatError: a newer version wrote it.
            ValueError: it is damaged; the message says how.
            UserError: it can't be read.
        """
        final = checkpoints_folder(output) / checkpoint_name(step)
        partial = final.with_name(final.name + PARTIAL)
        folder = f"{self.root}/checkpoints/{checkpoint_name(step)}"
        names = list(self._manifest(step)["files"])
        remove(partial)
        partial.mkdir(parents=True)
        there = self.checkpoints().get(step, {})
        with explained(self.name(step)), ThreadPoolExecutor(THREADS) as pool:
            whole = [name for name in names if name in there]  # what lacks is told below, as damage
            for _ in pool.map(lambda name: self.fs.get_file(f"{folder}/{name}", str(partial / name)), whole):
                pass
            self.fs.get_file(f"{folder}/{MANIFEST}", str(partial / MANIFEST))
        if reason := damage(partial):
            remove(partial)
            raise ValueError(reason)
        remove_checkpoint(final)
        return partial.rename(final)

    def fetch_record(self, output: Path) -> None:
        """Copies the run's record and figures into a folder, as far as there are any."""
        with explained(self.url):
            for name in (RECORD, METRICS):
                with suppress(FileNotFoundError):
                    self.fs.get_file(f"{self.root}/{name}", str(output / name))

    def _manifest(self, step: int) -> dict:
        """Raises as `fetch`."""
        with TemporaryDirectory() as folder:
            copy = Path(folder) / checkpoint_name(step)
            copy.mkdir()
            with explained(self.name(step)):
                self.fs.get_file(f"{self.root}/checkpoints/{copy.name}/{MANIFEST}", str(copy / MANIFEST))
            return read_manifest(copy)

    def _is_of_newer_format(self, step: int) -> bool:
        try:
            self._manifest(step)
        except (ValueError, UserError) as error:
            return isinstance(error, NewerFormatError)
        return False


def fetch_newer(url: str, output: Path, newest: Path | None, warn: Warn) -> Path | None:
    """Copies the newest complete checkpoint of a run in object storage to the run's folder on disk,
    with record and figures, unless the disk has it or a newer one.

    Args:
        url: the run's folder there.
        output: the run's folder on disk.
        newest: the newest complete checkpoint on disk, if there is one.
        warn: told what is fetched, and of each checkpoint that is passed over, and why.

    Returns:
        The checkpoint to go on from: what was fetched, or `newest`.

    Raises:
        UserError: the storage can't be read, or holds checkpoints of which none can be used.
    """
    remote = RemoteRun(url)
    with explained(url):
        there = remote.complete()
    here = -1 if newest is None else step_of(newest) or 0
    reasons = []
    for step in there:
        if step <= here:
            break
        try:
            found = remote.fetch(step, output)
        except NewerFormatError as error:
            raise UserError(
                f"the checkpoint {remote.name(step)} can't be used: its {MANIFEST} {error}; go on with the version "
                "that wrote it, or give another checkpoint.mirror"
            ) from None
        except ValueError as error:
            reasons.append(f"{checkpoint_name(step)}: {error}")
            warn(f"passing over the checkpoint {remote.name(step)}: {error}")
            continue
        remote.fetch_record(output)
        warn(f"the checkpoint {remote.name(step)} is newer than what {output} holds, and was copied there")
        return found
    if reasons and newest is None:
        raise UserError(
            f"no checkpoint in {url} can be used ({'; '.join(reasons[:3])}), and starting from scratch would replace "
            "them: put a whole copy of one back, give another checkpoint.mirror, or remove them to start over"
        )
    return newest


def claim_mirror(url: str, resume: str, parent: Path | None) -> None:
    """Makes sure that a run may keep its copies there, and that they are not another run's.

    Args:
        url: the run's folder in object storage.
        resume: the recipe's `run.resume`.
        parent: the checkpoint that the run goes on from.

    Raises:
        UserError: it may not write there, or would replace what is there.
    """
    remote = RemoteRun(url)
    with explained(url):
        there = remote.complete()
    if resume != "auto" and there and there[0] != (None if parent is None else step_of(parent)):
        raise UserError(
            f"run.resume is {resume}, but checkpoint.mirror is {url}, which holds a run whose newest checkpoint is "
            f"{checkpoint_name(there[0])}; continue that with --run.resume auto, or give another --checkpoint.mirror"
        )
    remote.claim(-1 if parent is None else step_of(parent) or 0)
