"""Files and folders that appear at their place complete or not at all; JSON and hashes of files.

A path is followed through symbolic links to what it names, and what is written takes the place of
that; what is deleted is the link. Names that nobody gave, of locks and of unfinished files, are
never followed.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from motifarch.errors import UserError, first_line
from motifarch.locks import locked

SEAL = "sha256"
"""The last field of a JSON file that holds the hash of its own content."""


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


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: it can't be read, or holds no JSON; the message is short and does not name it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"can't be read: {first_line(error)}") from None


def write_json(path: Path, content: Any) -> None:
    """Writes JSON with an indent of 2 through `atomic_write`."""
    with atomic_write(path) as file:
        file.write(_json_text(content))


def read_sealed_json(path: Path, *, unsealed: tuple[str, Any]) -> dict[str, Any]:
    """Reads what `write_sealed_json` wrote, without the hash.

    Args:
        path: the file.
        unsealed: a field and its value in files that were written without a hash, before there was
            one.

    Raises:
        ValueError: as `read_json`, it holds no object, or a byte of it has changed.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError("holds no JSON object")
    field, value = unsealed
    if SEAL in content or content.get(field) != value:
        content.pop(SEAL, None)
        if path.read_text(encoding="utf-8") != _json_text(_sealed(content)):
            raise ValueError("has changed since it was written (its own SHA-256 differs)")
    return content


def write_sealed_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object with the hash of its own content as its last field."""
    write_json(path, _sealed(content))


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    return content | {SEAL: hashlib.sha256(_json_text(content).encode()).hexdigest()}


def _json_text(content: Any) -> str:
    return json.dumps(content, indent=2) + "\n"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Deletes a file, a folder with all that is in it, or a link alone; nothing where none is.

    Raises:
        OSError: it can't be deleted.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """A name beside a damaged file that is not taken yet, under which it can be kept."""
    names = (path.with_name(f"{path.name}.damaged{count or ''}") for count in itertools.count())
    return next(name for name in names if not os.path.lexists(name))


def os_error(error: BaseException) -> OSError | None:
    """The operating system's error behind an error of torch's or safetensors' writers, which hide
    it; None where there is none.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        if found := re.search(r"os error (\d+)", str(cause)):  # as Rust says it
            return OSError(int(found[1]), os.strerror(int(found[1])))
        cause = cause.__cause__ or cause.__context__
    return None


# What only writing meets: a full disk, a quota, a file size limit, a read-only file system.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {*_FULL, errno.EROFS}


@contextmanager
def _explain_disk(output: Path, *, within: Path | None = None) -> Iterator[None]:
    """Turns errors of writing into a UserError: those that only writing meets, and all of files in
    the folder `within`, or of all files where that is None.
    """
    try:
        yield
    except BaseException as error:
        cause = os_error(error)
        if cause is None or isinstance(error, KeyboardInterrupt | UserError):
            raise
        path = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes) else None
        if within is None or cause.errno in _UNWRITABLE or (path is not None and path.is_relative_to(within)):
            remedy = "free some space, or write to another disk"
            if cause.errno not in _FULL:
                remedy = "check the permissions, or write elsewhere"
            raise UserError(f"{output} can't be written ({cause.strerror}): {remedy}") from None
        raise


@contextmanager
def claim_folder(output: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keeps other processes from making the folder meanwhile, and clears up what a killed one left.

    ``report`` is told in a line what was cleared up.

    Raises:
        UserError: another process is making the same folder, or it can't be written.
    """
    target = Path(os.path.realpath(output))
    with _explain_disk(output):
        target.parent.mkdir(parents=True, exist_ok=True)
    lock = locked(
        _beside(target, "lock"),
        lambda holder: (
            f"another process is preparing {output} ({holder}): wait until it ends, or give another --output"
        ),
        say=report,
        remove=True,
    )
    with lock:
        with _explain_disk(output):
            _clear_up(target, report)
        yield


def _clear_up(target: Path, report: Callable[[str], None]) -> None:
    working, replaced = _beside(target, "preparing"), _beside(target, "replaced")
    if os.path.lexists(replaced):  # killed within the last lines of new_folder
        if target.exists():
            remove(replaced)
        else:
            report(f"putting {target} back, which a run that was killed had moved aside")
            os.rename(replaced, target)
    if os.path.lexists(working):
        report(f"removing {working}, left by a run that was killed")
        remove(working)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Gives an empty folder beside ``output`` that takes its place when the block ends well.

    A folder that is there already is replaced then; of a link, what it points to. If the block
    raises, the new folder is removed and ``output`` stays as it was; if the process is killed,
    `claim_folder` clears up.

    Raises:
        UserError: it can't be written: the disk is full, or read-only.
    """
    target = Path(os.path.realpath(output))
    working, replaced = _beside(target, "preparing"), _beside(target, "replaced")
    with _explain_disk(output):
        working.mkdir()
    try:
        with _explain_disk(output, within=working):
            yield working
            _share(working)
        with _explain_disk(output):
            if target.exists():
                os.rename(target, replaced)
            try:
                os.rename(working, target)
            except OSError:
                with suppress(OSError):
                    os.rename(replaced, target)
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    with suppress(OSError):  # `claim_folder` tries again
        remove(replaced)


def _share(folder: Path) -> None:
    """Gives a new folder's files the permissions that the umask leaves, as the folder itself has
    them: safetensors writes its files for their owner alone.
    """
    wanted = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(stat.S_IMODE(file.stat().st_mode) | wanted)


def _beside(target: Path, purpose: str) -> Path:
    return target.parent / f".{target.name}.{purpose}"
