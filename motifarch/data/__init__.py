"""Data: from raw text to packed token blocks, and deterministic, resumable sampling from them."""

from typing import TYPE_CHECKING

from motifarch.lazy_names import lazy_names

if TYPE_CHECKING:
    from motifarch.data.balance import AttentionWork
    from motifarch.data.batch_schedule import BatchSchedule
    from motifarch.data.collation import collate
    from motifarch.data.loader import BatchLoader
    from motifarch.data.manifest import DataShape
    from motifarch.data.mixture import Mixture, MixtureComponent
    from motifarch.data.packed import Block, PackedDataset, check_same_seq_len, check_same_tokenizer
    from motifarch.data.packing import pack

__all__ = [
    "AttentionWork",
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

__getattr__ = lazy_names(
    __name__,
    {
        "AttentionWork": "balance",
        "BatchLoader": "loader",
        "BatchSchedule": "batch_schedule",
        "Block": "packed",
        "DataShape": "manifest",
        "Mixture": "mixture",
        "MixtureComponent": "mixture",
        "PackedDataset": "packed",
        "check_same_seq_len": "packed",
        "check_same_tokenizer": "packed",
        "collate": "collation",
        "pack": "packing",
    },
)
