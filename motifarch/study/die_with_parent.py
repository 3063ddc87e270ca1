"""``python die_with_parent.py PARENT COMMAND ...``: the command, ended with its parent (on Linux).

A run that outlived a killed study would go on writing into a folder that the next start resumes.
SIGTERM is what it gets, at which training saves first.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Asks to be ended with the parent, whose id comes first, and becomes the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)  # it was gone before this was asked for
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
