"""A command on a real terminal."""

import os
import subprocess
from contextlib import suppress


def on_a_terminal(command: list[str]) -> str:
    """What a command writes to standard error where that is a terminal; fails where it does."""
    ours, its = os.openpty()
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=its, env=environment) as process:
        os.close(its)
        shown = b""
        with suppress(OSError):  # the end, on Linux
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()
