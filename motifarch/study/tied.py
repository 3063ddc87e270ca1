"""``python tied.py PARENT COMMAND ...``: becomes the command, which ends with its parent
(on Linux).

A run that outlived a killed study would go on writing into a folder that the next start resumes.
SIGTERM is what it gets, at which training saves first.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Ties this process to its parent, whose id comes first, and replaces it by the command."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            sys.exit(128 + signal.SIGTERM)  # it was gone before the tie was made
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
