"""Reads checkpoints of torch.distributed.checkpoint as data: nothing that one holds is executed.

torch keeps a checkpoint's `.metadata`, and every number and text, as pickles, which may call any
function when they are read. Here they may only build what a checkpoint is made of.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

from motifarch.errors import UserError, first_line

METADATA = ".metadata"

_CLASSES: dict[tuple[str, str], type] = {
    **{
        (metadata.__name__, name): getattr(metadata, name)
        for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")
        if isinstance(getattr(metadata, name), type)
    },
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    (filesystem.__name__, "_StoragePrefix"): filesystem._StoragePrefix,
    # Where the checkpoint was written: a name, with which no file can be opened.
    **{
        (module, name): PurePath
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}
_LAYOUTS = {str(value): value for value in vars(torch).values() if isinstance(value, torch.layout)}
# All that a `.metadata` may name. Calling any of it with any data does no more than build a value.
_NAMES: dict[tuple[str, str], Any] = {
    **_CLASSES,
    ("torch", "Size"): torch.Size,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    ("torch.serialization", "_get_layout"): _LAYOUTS.__getitem__,
}


class _MetadataUnpickler(pickle.Unpickler):
    """Builds torch.distributed.checkpoint's own classes, sizes, dtypes, layouts and plain data."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a checkpoint") from None


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Puts back what a pickle sets on a class itself, which is among the things a pickle can do.

    Raises:
        pickle.UnpicklingError: it had set something.
    """
    before = {kind: dict(vars(kind)) for kind in _CLASSES.values()}
    try:
        yield
    finally:
        changed = [kind for kind, attributes in before.items() if dict(vars(kind)) != attributes]
        for kind in changed:
            for name in vars(kind).keys() - before[kind].keys():
                delattr(kind, name)
            for name, value in before[kind].items():
                if vars(kind)[name] is not value:
                    setattr(kind, name, value)
    if changed:
        raise pickle.UnpicklingError(f"it changes the class {changed[0].__name__}")


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    try:
        with path.open("rb") as file, _unchanged_classes():
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(found).__name__}, where Metadata is expected")
        if outside := {info.relative_path for info in found.storage_data.values()} - set(os.listdir(folder)):
            raise pickle.UnpicklingError(f"it names the file {min(outside)}, which is not in the folder")
    except OSError as error:
        raise UserError(f"the checkpoint {folder} can't be read: {METADATA}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise UserError(
            f"the checkpoint {folder} can't be used: its {METADATA} is damaged or no checkpoint's "
            f"({first_line(error)}); nothing in it was executed. Use another checkpoint, or a copy that you trust"
        ) from None
    return found


class CheckpointReader(dcp.FileSystemReader):
    """A checkpoint's folder, opened; its metadata is read once, for with many ranks it is large.

    Raises:
        UserError: the metadata can't be read, or is not what a checkpoint's is.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.folder = Path(folder)
        self._metadata = _read_metadata(self.folder)
        self._metadata.storage_meta = metadata.StorageMeta(load_id=self.load_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the constructor has read."""
        return self._metadata

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Every tensor's name with its dtype and size."""
        saved = self._metadata.state_dict_metadata.items()
        return {name: entry for name, entry in saved if isinstance(entry, TensorStorageMetadata)}

    def load(self, content: Mapping[str, Any], *, no_dist: bool = False) -> None:
        """Reads into nested dictionaries of tensors, sharded or not, numbers and texts, in place.

        All ranks do it together, or one without a process group (`no_dist`). The checkpoint may
        hold more than is asked for, and may have been written by any number of ranks.

        Raises:
            UserError: something is missing or has another shape, or a file can't be read.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            try:
                dcp.load(dict(content), storage_reader=self, planner=_Planner(self.folder), no_dist=no_dist)
            except dcp.CheckpointException as error:  # of a rank's own work; a lost rank is another error
                _, (cause, _) = min(error.failures.items())
                if isinstance(cause, UserError):
                    raise UserError(str(cause)) from None
                reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(cause)
                raise UserError(f"the checkpoint {self.folder} can't be read: {reason}") from None


class _Planner(DefaultLoadPlanner):
    """Compares before it reads, and reads numbers and texts as data."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = self.metadata.state_dict_metadata
        for name, wanted in self.state_dict.items():
            held = saved.get(name)
            if held is None:
                self._refuse(f"it lacks {name}")
            if isinstance(wanted, torch.Tensor) != isinstance(held, TensorStorageMetadata):
                self._refuse(f"{name} is a tensor in one of them alone")
            if isinstance(held, TensorStorageMetadata) and held.size != wanted.shape:
                self._refuse(f"{name} is {tuple(held.size)} there and {tuple(wanted.shape)} in the model")
        return super().create_local_plan()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        # torch reads these with weights_only=False: what is read safely is handed on written anew.
        safe = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), safe)
        safe.seek(0)
        super().load_bytes(read_item, safe)

    def _refuse(self, reason: str) -> None:
        raise UserError(
            f"the checkpoint {self._folder} does not fit the recipe's model: {reason}; use the recipe it was made "
            "with, or start afresh in another run.output"
        )
