"""Lock files: who writes into a folder, so that nobody else does at the same time."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from motifarch.errors import UserError

_HELD = {errno.EACCES, errno.EAGAIN}
# What file systems without locks answer, such as NFS without its lock service.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
_POLL_S = 0.2


def open_lock_file(path: Path) -> int:
    """Opens a lock file, made if need be, and returns its descriptor; a link is not followed.

    Raises:
        UserError: it can't be opened, or is no plain file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        link = error.errno == errno.ELOOP
        reason = "it is a symbolic link; remove it" if link else f"{error.strerror}; give another folder, or mend that"
        raise UserError(f"the lock file {path} can't be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"the lock file {path} is no plain file; remove it")
    return descriptor


@contextmanager
def locked(
    path: Path,
    refusal: Callable[[str], str],
    *,
    patience_s: float = 0.0,
    say: Callable[[str], object] = print,
    remove: bool = False,
) -> Iterator[None]:
    """Holds a lock file, together with all shares of it (`share`).

    The lock ends with the process, however that ends. It is a record lock: unlike flock's, child
    processes, which may outlive a killed parent, lack it.

    Args:
        path: the lock file, in a folder that exists. It says who holds it.
        refusal: makes the message for who comes second from the holder ("pid 12 on node-a, ...").
        patience_s: how long to wait for the holder, in seconds.
        say: told where the file system has no locks, and nobody is kept out.
        remove: whether the file goes at the end.

    Raises:
        UserError: another process holds it, or it can't be opened.
    """
    until = time.monotonic() + patience_s
    while True:
        descriptor = open_lock_file(path)
        with contextlib.closing(os.fdopen(descriptor, "r+b", buffering=0)):
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    say(f"warning: {path} can't be locked ({error.strerror}): make sure that nobody else writes there")
                elif error.errno not in _HELD:
                    raise UserError(f"the lock file {path} can't be locked: {error.strerror}") from None
                elif time.monotonic() > until:
                    raise UserError(refusal(_holder(descriptor))) from None
                else:
                    time.sleep(_POLL_S)
                    continue
            # The last holder may have removed the file between our opening and locking it.
            if not path.exists() or os.fstat(descriptor).st_ino != path.stat().st_ino:
                continue
            _sign(descriptor)
            with contextlib.suppress(OSError):
                fcntl.lockf(descriptor, fcntl.LOCK_UN, 0, 1)  # these bytes are for those who share it
            try:
                yield
            finally:
                if remove:
                    path.unlink(missing_ok=True)
            return


@contextmanager
def share(path: Path, number: int) -> Iterator[None]:
    """Keeps a lock file that another process of the same work holds from being `locked` anew, where
    that can be done.

    Args:
        path: the lock file.
        number: this process's own among those that share it, from 1.
    """
    with contextlib.ExitStack() as stack:
        # The holder has said what can't be locked; a network file system may not show the file yet.
        with contextlib.suppress(OSError, UserError):
            file = stack.enter_context(os.fdopen(open_lock_file(path), "r+b", buffering=0))
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock file; False where there is none or it can't be asked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    finally:
        os.close(descriptor)
    return False


def _sign(descriptor: int) -> None:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now})
    with contextlib.suppress(OSError):  # a full disk: the lock counts, not its text
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text.encode(), 0)


def _holder(descriptor: int) -> str:
    try:
        content = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {content['pid']} on {content['host']}, since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"
