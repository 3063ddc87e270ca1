"""The one exception that is meant for the person at the keyboard, and what torchrun is told at the
end.
"""

import json
import os
import time


class UserError(Exception):
    """Something the user can mend: a wrong setting, a missing folder, a full disk.

    Its message names the thing, its value, what is accepted and the fix. The command line prints
    the message alone, without a traceback, and exits with status 2.
    """


def tell_torchrun(message: str) -> None:
    """Gives torchrun, where this process is one of its own, the message for the report that it ends
    with.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with open(path, "w", encoding="utf-8") as file:
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)
