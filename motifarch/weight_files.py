"""A model folder's safetensors files: checked at once, read a tensor at a time."""

import os
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from motifarch.errors import UserError, first_line
from motifarch.files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

SHOWN = 4
"""Names of tensors that a message lists."""

# What safetensors calls the dtypes that weights are kept in.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ModelFolderError(UserError, ValueError, RuntimeError):
    """A model's folder that cannot be read whole; as transformers' users catch, a ValueError, and a
    RuntimeError of shapes that differ.
    """


class WeightFiles:
    """The tensors of a folder with one safetensors file, or shards and their index; never written
    to.

    Every file's header is read at once, so that a missing or truncated file is found before work
    begins; tensors are read when asked for, by their ``names``, which are in the files' order.
    Where a folder has both, the single file counts, as in transformers. A ``variant`` is part of
    the files' names, as transformers takes it.

    Raises:
        ModelFolderError: there are no such files, one is missing, truncated or damaged, or the
            index names a tensor that is not there.
    """

    def __init__(self, path: Path, variant: str | None = None) -> None:
        self.path = path
        self._files: dict[str, str] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        single, index = file_names(variant)
        if (path / single).is_file():
            self._read_header(single, None, index)
        elif (path / index).is_file():
            for file, names in _read_index(path / index).items():
                self._read_header(file, names, index)
        else:
            raise ModelFolderError(
                f"{path} has neither {single} nor {index}; other formats are not read: save the model with "
                "save_pretrained first"
            )
        self.names = list(self._files)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [self.path / file for file in dict.fromkeys(self._files.values())]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._about[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor, without reading it.

        Raises:
            ModelFolderError: it is none that weights are computed with.
        """
        dtype = self._about[name][1]
        if dtype not in _DTYPES:
            raise ModelFolderError(
                f"{self.path / self._files[name]} holds {name} as {dtype}; weights are read as {', '.join(_DTYPES)}: "
                "save the model unquantised"
            )
        return _DTYPES[dtype]

    def read(self, name: str) -> Tensor:
        """A tensor, read from its file.

        Raises:
            ModelFolderError: the file has been damaged or removed since the folder was opened.
        """
        file = self.path / self._files[name]
        try:
            # Opened anew for each tensor: an open file keeps the pages that were read in memory.
            with safe_open(file, framework="pt") as tensors:
                tensor: Tensor = tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{file} can't be read any more: {first_line(error)}") from None
        return tensor

    def _read_header(self, file: str, names: list[str] | None, index: str) -> None:
        path = self.path / file
        if not path.is_file():
            raise ModelFolderError(f"{path} is missing, but {index} says it holds {listed(names or ())}; copy it anew")
        try:
            with safe_open(path, framework="pt") as tensors:
                held = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  # it is no mapping
                about = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in held.items()}
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(
                f"{path} is truncated or damaged ({first_line(error)}); copy or export it anew"
            ) from None
        names = list(about) if names is None else names
        absent = [name for name in names if name not in about]
        if absent:
            raise ModelFolderError(f"{path} lacks {listed(absent)}, which {index} says it holds; copy both anew")
        for name in names:
            self._files[name], self._about[name] = file, about[name]


def file_names(variant: str | None = None) -> tuple[str, str]:
    """The names of the single file and of the index."""
    if variant is None:
        return SINGLE, INDEX
    single, index = (f".{variant}.".join(name.rsplit(".", 1)) for name in (SINGLE, INDEX))
    return single, index


def _read_index(index: Path) -> dict[str, list[str]]:
    """The names of the tensors in each file."""
    files: dict[str, list[str]] = defaultdict(list)
    try:
        for name, file in read_json(index)["weight_map"].items():
            files[os.fspath(file)].append(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelFolderError(
            f"{index} is damaged: it must be JSON with a weight_map from tensors to files; copy or export it anew"
        ) from None
    for file in files:
        # A path would read here, and in transformers, what lies outside the folder that was given.
        if os.path.basename(file) != file or file in ("", ".", "..") or "\\" in file or "\0" in file:
            raise ModelFolderError(
                f"{index} names the file {file!r}; it may name files of its own folder alone, without a path: "
                "copy or export it anew"
            )
    return files


def listed(names: Collection[str]) -> str:
    """A few names, and how many more there are."""
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
