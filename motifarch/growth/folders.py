"""Hugging Face model folders, read and written a tensor at a time."""

import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from fnmatch import fnmatch
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from motifarch.errors import UserError, first_line
from motifarch.files import claim_folder, new_folder, write_json
from motifarch.model_folder import CONFIG, read_object
from motifarch.weight_files import INDEX, SINGLE, WeightFiles

MAX_SHARD_BYTES = 2 * 2**30
"""Of a file that is written: a shard is gathered in memory."""

CARRIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "*.jinja",
)
"""Files that say how to use a model rather than what it computes."""


class SourceFolder(WeightFiles):
    """A folder with config.json (``config``, as it is) and safetensors files; never written to.

    Raises:
        UserError: the folder, its config or one of its weight files is missing, damaged or cut
            short, a tensor that the index names is not there, or a tensor's dtype is not one that
            weights are kept in.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"{path} is no folder; give a Hugging Face model's folder")
        self.config: dict[str, Any] = _read_config(path)
        super().__init__(path)
        for name in self.names:
            self.dtype(name)  # refuses packed numbers now


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} has no {CONFIG}; give a folder with {CONFIG} and safetensors files")
    return read_object(folder / CONFIG)


class FolderWriter:
    """A model folder that appears under its name only when it is whole.

    A context manager: what is written goes into ``folder``, beside the output, which is renamed
    when the block ends well and removed when it raises. At most a shard is held in memory besides
    the tensor being written.

    Args:
        output: the folder to make.
        config: what config.json is to hold.
        max_shard_bytes: of a file; a larger tensor gets a file of its own.
        carry_from: a folder whose tokenizer and generation files are copied.
        report: told in a line what a killed process had left and was cleared up.

    Raises:
        UserError: on entry, if the output exists or another process is making it.
    """

    def __init__(
        self,
        output: Path,
        config: dict[str, Any],
        *,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        carry_from: Path | None = None,
        report: Callable[[str], None] = print,
    ) -> None:
        self.output, self.config, self.max_shard_bytes = output, config, max_shard_bytes
        self.carry_from, self.report = carry_from, report
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = self._total_bytes = 0
        self._shards: list[list[str]] = []
        self._finished = False
        self._stack = ExitStack()

    def __enter__(self) -> "FolderWriter":
        """Begins the folder."""
        with ExitStack() as stack:
            stack.enter_context(claim_folder(self.output, self.report))
            if self.output.exists():
                raise UserError(f"{self.output} exists already; remove it, or give another output folder")
            self.folder = stack.enter_context(new_folder(self.output))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Completes the folder and gives it its name, or removes it if the block raised."""
        with self._stack:
            if error is not None:
                raise error
            self.finish()

    def write(self, name: str, tensor: Tensor) -> None:
        """Adds a tensor.

        Raises:
            UserError: the disk is full, or can't be written to.
        """
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self.max_shard_bytes:
            self._write_shard()
        self._shard[name] = tensor.contiguous()
        self._shard_bytes += size
        self._total_bytes += size
        if self._shard_bytes >= self.max_shard_bytes:
            self._write_shard()

    def finish(self) -> None:
        """Writes what is held and all other files; the folder has yet to get its name."""
        if self._finished:
            return
        self._finished = True
        if self._shard:
            self._write_shard()
        files = [f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors" for i in range(len(self._shards))]
        if len(files) == 1:
            files = [SINGLE]
        for i, file in enumerate(files):
            os.rename(self.folder / _partial(i), self.folder / file)
        if len(files) > 1:
            placed = {name: file for file, names in zip(files, self._shards, strict=True) for name in names}
            write_json(self.folder / INDEX, {"metadata": {"total_size": self._total_bytes}, "weight_map": placed})
        for path in sorted(self.carry_from.iterdir()) if self.carry_from else ():
            if path.is_file() and any(fnmatch(path.name, pattern) for pattern in CARRIED):
                shutil.copyfile(path, self.folder / path.name)
        write_json(self.folder / CONFIG, self.config)

    def _write_shard(self) -> None:
        try:
            save_file(self._shard, self.folder / _partial(len(self._shards)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.output} can't be written: {first_line(error)}") from None
        self._shards.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0


def _partial(shard: int) -> str:
    return f"shard-{shard + 1:05}"


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor of a shape and dtype."""
    return math.prod(shape) * dtype.itemsize
