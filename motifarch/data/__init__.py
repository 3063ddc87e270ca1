"""Data: from raw text to packed token blocks, and deterministic, resumable sampling from them."""

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
