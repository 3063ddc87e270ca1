"""Training in which rank 1 hangs and dies, each once: FOLDER KIND:STEP,... ARGS"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from motifarch.cli import main
from motifarch.data import BatchLoader

read = BatchLoader.micro_batches


def sleep_for_ever() -> None:
    time.sleep(1000)


def plan(folder: Path, troubles: dict[int, str]) -> None:
    def read_or_not(loader: BatchLoader, step: int) -> Any:
        marker = folder / f"had_trouble_at_{step}"
        if step in troubles and loader.rank == 1 and not marker.exists():
            marker.touch()
            sleep_for_ever() if troubles[step] == "hang" else os.kill(os.getpid(), signal.SIGKILL)
        return read(loader, step)

    BatchLoader.micro_batches = read_or_not  # type: ignore[method-assign]


if __name__ == "__main__":
    kinds = [trouble.split(":") for trouble in sys.argv[2].split(",")]
    plan(Path(sys.argv[1]), {int(step): kind for kind, step in kinds})
    main(["train", *sys.argv[3:]])
