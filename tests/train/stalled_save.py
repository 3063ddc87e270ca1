"""Training whose save of step 20 hangs after the shards are written."""

import sys
import time
from typing import Any

from motifarch.cli import main
from motifarch.train import checkpoint

finish = checkpoint.CheckpointWriter.finish


def stall(writer: Any, *args: Any, **kwargs: Any) -> None:
    if writer.step == 20:
        time.sleep(1000)
    finish(writer, *args, **kwargs)


if __name__ == "__main__":
    checkpoint.CheckpointWriter.finish = stall  # type: ignore[method-assign]
    main(["train", *sys.argv[1:]])
