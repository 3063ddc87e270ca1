"""Files and folders that appear at their place complete or not at all; JSON and hashes of files."""

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from motifarch.locks import locked


@contextmanager
def atomic_write(path: Path, *, binary: bool = False) -> Iterator[Any]:
    """Opens a file to write that takes its name when the block ends well.

    A reader finds the old file or the new one, never a part. If the block raises, the old file
    stays. As with `open`, a link is followed, an existing file keeps its permissions, and a pipe
    or a device is written to directly.

    Args:
        path: the file.
        binary: whether it takes bytes; otherwise text, as UTF-8.

    Raises:
        OSError: it can't be written; `filename` is the path.
    """
    target = Path(os.path.realpath(path))
    encoding = None if binary else "utf-8"
    exists = path.exists()
    if exists and not path.is_file():
        with path.open("wb" if binary else "w", encoding=encoding) as file:
            yield file
        return
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb" if binary else "x", encoding=encoding) as file:
            if exists:
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with an indent of 2 through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def claim_folder(output: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keeps other processes from making the folder meanwhile, and clears up what a killed one left.

    ``report`` is told in a line what was cleared up.

    Raises:
        UserError: if another process is making the same folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(
        _beside(output, "lock"),
        lambda holder: (
            f"another process is preparing {output} ({holder}): wait until it ends, or give another --output"
        ),
        say=report,
        remove=True,
    )
    with lock:
        working, replaced = _beside(output, "preparing"), _beside(output, "replaced")
        if replaced.exists():  # killed within the last lines of new_folder
            if output.exists():
                shutil.rmtree(replaced)
            else:
                report(f"putting {output} back, which a run that was killed had moved aside")
                os.rename(replaced, output)
        if working.exists():
            report(f"removing {working}, left by a run that was killed")
            shutil.rmtree(working)
        yield


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``output`` that takes its place when the block ends well.

    A folder that is there already is replaced then. If the block raises, the new folder is removed
    and ``output`` stays as it was; if the process is killed, `claim_folder` clears up.
    """
    working, replaced = _beside(output, "preparing"), _beside(output, "replaced")
    working.mkdir()
    try:
        yield working
        if output.exists():
            os.rename(output, replaced)
        os.rename(working, output)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def _beside(output: Path, purpose: str) -> Path:
    return output.parent / f".{output.name}.{purpose}"
