"""Data: from raw text to packed token blocks, and deterministic, resumable sampling from them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from motifarch.data.batch_schedule import BatchSchedule
    from motifarch.data.collation import collate
    from motifarch.data.loader import BatchLoader
    from motifarch.data.manifest import DataShape
    from motifarch.data.mixture import Mixture, MixtureComponent
    from motifarch.data.packed import Block, PackedDataset, check_same_seq_len, check_same_tokenizer
    from motifarch.data.packing import pack

__all__ = [
    "BatchLoader",
    "BatchSchedule",
    "Block",
    "DataShape",
    "Mixture",
    "MixtureComponent",
    "PackedDataset",
    "check_same_seq_len",
    "check_same_tokenizer",
    "collate",
    "pack",
]

_MODULES = {
    "batch_schedule": ["BatchSchedule"],
    "collation": ["collate"],
    "loader": ["BatchLoader"],
    "manifest": ["DataShape"],
    "mixture": ["Mixture", "MixtureComponent"],
    "packed": ["Block", "PackedDataset", "check_same_seq_len", "check_same_tokenizer"],
    "packing": ["pack"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: `motifarch data prepare --help` should not wait for torch.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
