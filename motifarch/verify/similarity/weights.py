"""Opens what is compared, whatever folder it lies in, and reads it a tensor at a time."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from motifarch.checkpoint_reader import METADATA, CheckpointReader
from motifarch.errors import UserError
from motifarch.train.manifest import checkpoints_folder, complete_checkpoints
from motifarch.weight_files import WeightFiles, file_names

_PREFIX = "model."
"""What a checkpoint puts before the weights' names; its other tensors are the optimizer's."""


class Weights(Protocol):
    """A model's weights on disk."""

    names: list[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""

    def read(self, name: str) -> Tensor:
        """A tensor, read from its file."""


class CheckpointWeights:
    """The weights in a training checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._reader = CheckpointReader(folder)
        self._tensors = self._reader.tensors
        self.names = [name.removeprefix(_PREFIX) for name in self._tensors if name.startswith(_PREFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return tuple(self._tensors[_PREFIX + name].size)

    def read(self, name: str) -> Tensor:
        """A tensor, read from its file."""
        about = self._tensors[_PREFIX + name]
        content = {_PREFIX + name: torch.empty(about.size, dtype=about.properties.dtype)}
        self._reader.load(content, no_dist=True)
        return content[_PREFIX + name]


def open_weights(folder: Path) -> Weights:
    """The weights of a model's folder, of a run's newest checkpoint, or of a checkpoint.

    Raises:
        UserError: the folder is none of these, or damaged.
    """
    if any((folder / file).is_file() for file in file_names()):
        return WeightFiles(folder)
    if (folder / METADATA).is_file():
        return CheckpointWeights(folder)
    newest = next(iter(complete_checkpoints(checkpoints_folder(folder), limit=1, hashes=False)), None)
    if newest is None:
        raise UserError(
            f"{folder} holds no weights that can be compared; give a model's folder with {' or '.join(file_names())}, "
            "a run's output folder with a complete checkpoint, or a checkpoint's folder"
        )
    return CheckpointWeights(newest)
