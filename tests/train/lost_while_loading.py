"""Training on several ranks of which the last ends without a word once it should load."""

import os
import sys
from typing import Any

import torch.distributed as dist

from motifarch.checkpoint_reader import CheckpointReader
from motifarch.cli import main

load = CheckpointReader.load


def leave(reader: CheckpointReader, content: Any, **options: Any) -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(9)
    load(reader, content, **options)


if __name__ == "__main__":
    CheckpointReader.load = leave  # type: ignore[method-assign]
    main(["train", *sys.argv[1:]])
