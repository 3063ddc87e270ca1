"""The manifest of a checkpoint: what makes a folder count as complete, and how that is verified.

A checkpoint folder holds torch.distributed.checkpoint's files and `manifest.json`, written last
with every other file's size and SHA-256, and one of its own content. Without one that agrees, the
folder is passed over.
"""

import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from motifarch.checkpoint_reader import METADATA
from motifarch.files import read_sealed_json, remove, sha256, write_sealed_json

MANIFEST = "manifest.json"
FORMAT = 2
"""Of manifests that are written; those of format 1, which held no hash of themselves, are read."""
PARTIAL = ".partial"
_NAME = re.compile(r"step_(\d+)(?:\.partial)?", re.ASCII)
_ABOUT = {"seed": int | None, "compute": str, "data": list, "tokenizer": str, "model_config": dict}


class NewerFormatError(ValueError):
    """A manifest that a newer version of motifarch wrote."""


def checkpoints_folder(output: Path) -> Path:
    """Where a run's output folder keeps its checkpoints."""
    return output / "checkpoints"


def checkpoint_name(step: int) -> str:
    """A checkpoint's folder name, which sorts by step."""
    return f"step_{step:08d}"


def write_manifest(checkpoint: Path, *, step: int, about: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Makes a checkpoint folder count as complete.

    Args:
        checkpoint: its folder, which holds all files.
        step: optimizer steps done.
        about: what the run noted, as `motifarch.train.record.about_checkpoint`, or nothing.
        files: each file's name with its `size` in bytes and its `sha256`.
    """
    content = {"format": FORMAT, "step": step, "about": about, "files": dict(sorted(files.items()))}
    write_sealed_json(checkpoint / MANIFEST, content)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint: `step`, `about` (what the run noted) and `files`.

    Raises:
        NewerFormatError: it is whole, but of a format that is not known yet.
        ValueError: it can't be read, or is damaged; the message says so without naming it.
    """
    content = read_sealed_json(checkpoint / MANIFEST, unsealed=("format", 1))
    version = content.get("format")
    if type(version) is int and version > FORMAT:
        raise NewerFormatError(f"is of format {version}, and this version of motifarch reads formats up to {FORMAT}")
    if not _is_manifest(content):
        raise ValueError("is damaged: a field is missing or of another type")
    return content


def _is_manifest(content: dict[str, Any]) -> bool:
    files = content.get("files")
    return (
        content.get("format") in (1, FORMAT)
        and type(content.get("step")) is int
        and isinstance(files, dict)
        and METADATA in files
        # A name, never a path: a manifest speaks of its own folder alone.
        and all(os.path.basename(name) == name and name not in ("", ".", "..") for name in files)
        and all(isinstance(f, dict) and type(f.get("size")) is int and "sha256" in f for f in files.values())
        and _is_about(content.get("about"))
    )


def _is_about(about: Any) -> bool:
    """Whether this is what a run notes, or empty: who saves without a run has nothing to note."""
    return about == {} or (
        isinstance(about, dict)
        and all(isinstance(about.get(name), kind) for name, kind in _ABOUT.items())
        and about["compute"] in ("float32", "bfloat16")
        and bool(about["data"])
        and all(isinstance(d, dict) and {"path", "fingerprint"} <= d.keys() for d in about["data"])
    )


def damage(checkpoint: Path, hashes: bool = True) -> str | None:
    """Says why a checkpoint folder can't be used; None for a complete and undamaged one.

    Without `hashes`, files are not read: their sizes alone are compared.
    """
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so its save was cut short"
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return f"its {MANIFEST} {error}"
    if step_of(checkpoint) not in (None, manifest["step"]):
        return f"its {MANIFEST} is of step {manifest['step']}"
    files: dict[str, dict[str, Any]] = manifest["files"]
    try:
        for name, expected in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"its file {name} is missing"
            if path.stat().st_size != expected["size"]:
                return f"its file {name} has {path.stat().st_size:,} bytes instead of {expected['size']:,}"
        if hashes:
            # hashlib releases the interpreter's lock, so threads read in parallel.
            with ThreadPoolExecutor(max_workers=8) as pool:
                for name, digest in zip(files, pool.map(lambda n: sha256(checkpoint / n), files), strict=True):
                    if digest != files[name]["sha256"]:
                        return f"its file {name} has changed since it was written (its SHA-256 differs)"
    except OSError as error:
        return f"its files can't be read: {error.strerror}"
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint folder's name, or None where the name is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def counts_as_saved(checkpoint: Path) -> bool:
    """Whether a checkpoint folder was complete once, whatever became of it."""
    return not checkpoint.name.endswith(PARTIAL) or os.path.lexists(checkpoint / MANIFEST)


def is_of_newer_format(checkpoint: Path) -> bool:
    """Whether a newer version of motifarch wrote a checkpoint, which this one can't read."""
    try:
        read_manifest(checkpoint)
    except ValueError as error:
        return isinstance(error, NewerFormatError)
    return False


def list_checkpoints(output: Path) -> list[Path]:
    """All checkpoint folders of a run, complete or not, newest first."""
    return _sorted(checkpoints_folder(output))


def _sorted(folder: Path) -> list[Path]:
    found = [(step, p) for p in folder.iterdir() if (step := step_of(p)) is not None] if folder.is_dir() else []
    # At the same step the final name comes before the partial one.
    return [p for _, p in sorted(found, key=lambda sp: (-sp[0], sp[1].name))]


def complete_checkpoints(
    folder: Path,
    *,
    up_to: int | None = None,
    limit: int | None = None,
    hashes: bool = True,
    warn: Callable[[str], None] | None = None,
) -> list[Path]:
    """Lists complete and undamaged checkpoints, newest first, each step once.

    Args:
        folder: where checkpoints lie side by side.
        up_to: leaves out those of later steps.
        limit: stops when there are so many.
        hashes: as in `damage`.
        warn: told of each checkpoint that is passed over, and why.
    """
    complete: dict[int, Path] = {}
    for checkpoint in _sorted(folder):
        step = step_of(checkpoint) or 0
        if step in complete or (up_to is not None and step > up_to):
            continue
        if limit is not None and len(complete) == limit:
            break
        reason = damage(checkpoint, hashes)
        if reason is None:
            complete[step] = checkpoint
        elif warn:
            warn(f"passing over the checkpoint {checkpoint}: {reason}")
    return list(complete.values())


def find_newest(output: str | Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest complete and undamaged checkpoint in a run's output folder, or None.

    `warn` is told of each newer one that is passed over, and why.
    """
    return next(iter(complete_checkpoints(checkpoints_folder(Path(output)), limit=1, warn=warn)), None)


def remove_checkpoint(checkpoint: Path) -> None:
    """Deletes a checkpoint, its manifest first: what is left never looks complete. Of a link, the
    link alone goes: what it points to is not this run's.
    """
    if checkpoint.is_dir() and not checkpoint.is_symlink():
        remove(checkpoint / MANIFEST)
    with suppress(OSError):  # the next `prune` tries again
        remove(checkpoint)


def prune(output: Path, keep_last: int, newest: Path, *, in_use: Path | None = None) -> None:
    """Deletes a run's complete checkpoints but the newest `keep_last` (0 keeps all), and what cut
    short saves and deletions have left. Nothing newer than `newest`, which was completed just now,
    is touched, nor what is `in_use`, nor what has a manifest that says more than this version
    understands.
    """
    limit = step_of(newest) or 0
    kept = {limit}
    for checkpoint in list_checkpoints(output):
        step = step_of(checkpoint) or 0
        if step > limit or checkpoint in (newest, in_use):
            continue
        whole = damage(checkpoint, hashes=False) is None
        if whole and step not in kept and (not keep_last or len(kept) < keep_last):
            kept.add(step)
        elif whole or not os.path.lexists(checkpoint / MANIFEST):
            remove_checkpoint(checkpoint)
