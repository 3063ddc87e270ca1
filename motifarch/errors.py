"""The exception for errors that a user can mend, and the report that torchrun prints at the end."""

import errno
import json
import os
import time

PATH_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}
"""Of a path that can't be what it is given for."""

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
"""Of a full disk, a quota, a file size limit, a read-only file system, missing permissions."""


class UserError(Exception):
    """An error that the user can mend: a wrong setting, a missing folder, a full disk.

    Its message names the thing, its value, what is accepted and the fix. The command line prints
    the message alone, without a traceback, and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an error says first, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException, limit: int = 300) -> str:
    """All that an error says, in a line, after its kind."""
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return said if len(said) <= limit else f"{said[: limit - 3]}..."


def tell_torchrun(message: str) -> None:
    """Writes the message that torchrun, if it started this process, prints in its report."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
