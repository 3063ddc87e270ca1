"""The manifest of a checkpoint: what makes a folder count as complete, and how that is verified.

A checkpoint folder holds torch.distributed.checkpoint's files and `manifest.json`, written last
with every other file's size and SHA-256. Without one that agrees, the folder is passed over.
"""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from motifarch.files import sha256

MANIFEST = "manifest.json"
FORMAT = 1
PARTIAL = ".partial"
_NAME = re.compile(r"step_(\d+)(?:\.partial)?")


def checkpoints_folder(output: Path) -> Path:
    """Where a run's output folder keeps its checkpoints."""
    return output / "checkpoints"


def checkpoint_name(step: int) -> str:
    """A checkpoint's folder name, which sorts by step."""
    return f"step_{step:08d}"


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint: `step`, `about` (what the run noted) and `files`."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def damage(checkpoint: Path, hashes: bool = True) -> str | None:
    """Says why a checkpoint folder can't be used; None for a complete and undamaged one.

    Without `hashes`, files are not read: their sizes alone are compared.
    """
    if not (checkpoint / MANIFEST).is_file():
        return f"it has no {MANIFEST}, so its save was cut short"
    try:
        manifest = read_manifest(checkpoint)
        files: dict[str, dict[str, Any]] = manifest["files"]
        version = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"its {MANIFEST} can't be read"
    if version != FORMAT:
        return f"its format is {version}, and this version of motifarch reads format {FORMAT}"
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
    return None


def step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint folder's name, or None where the name is no checkpoint's."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


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
    """Deletes a checkpoint, its manifest first: what is left never looks complete."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def prune(output: Path, keep_last: int, newest: Path) -> None:
    """Deletes a run's complete checkpoints but the newest `keep_last` (0 keeps all), and unfinished
    ones older than `newest`, which was completed just now. Nothing newer is touched.
    """
    limit = step_of(newest) or 0
    kept = 0
    for checkpoint in list_checkpoints(output):
        if (step_of(checkpoint) or 0) > limit:
            continue
        if damage(checkpoint, hashes=False) is None and not checkpoint.name.endswith(PARTIAL):
            kept += 1
            if keep_last and kept > keep_last:
                remove_checkpoint(checkpoint)
        elif checkpoint != newest:
            remove_checkpoint(checkpoint)
