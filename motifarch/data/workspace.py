"""A folder that appears at its place complete or not at all, whatever happens to the process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from motifarch.errors import UserError


@contextmanager
def claim(output: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keep other processes from making ``output`` meanwhile, and clear up what a killed one left.

    Args:
        output: the folder to be made.
        report: told in a line what was cleared up.

    Raises:
        UserError: if another process is making the same folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _lock(_beside(output, "lock"), output):
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
    """Give an empty folder beside ``output`` that takes its place when the block ends well.

    A folder that is there already is replaced then. If the block raises, the new folder is removed
    and ``output`` stays as it was; if the process is killed, :func:`claim` clears up.
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


@contextmanager
def _lock(path: Path, output: Path) -> Iterator[None]:
    # A record lock: unlike flock's, it is not inherited by child processes, which may outlive a
    # killed parent.
    while True:
        with open(path, "w") as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"another process is preparing {output}: wait until it ends, or give another --output"
                ) from None
            # The last holder may have removed the file between our opening and locking it.
            if not path.exists() or os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
