"""Training in which rank 1 is killed while tokens are exchanged, once: FOLDER MESSAGES ARGS"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from motifarch.cli import main
from motifarch.layers import token_exchange

send = token_exchange._all_to_all


def kill_at(message: int, marker: Path) -> None:
    """Kills this process instead of the message of this number, unless the marker is there."""
    sent = 0

    def send_or_not(*arguments: Any) -> Any:
        nonlocal sent
        sent += 1
        if sent == message and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return send(*arguments)

    token_exchange._all_to_all = send_or_not


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        kill_at(int(sys.argv[2]), Path(sys.argv[1]) / "was_killed")
    main(["train", *sys.argv[3:]])
