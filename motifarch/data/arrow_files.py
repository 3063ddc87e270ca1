"""Streams of tables as memory-mapped Arrow files; memory does not grow with them."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter

from motifarch.data.mapped_pages import pages_given_back
from motifarch.data.packed import Block, block_checksum

T = TypeVar("T")

_TOKENS_PER_TABLE = 2**22


def write_tables(path: Path, tables: Iterable[pa.Table], features: datasets.Features) -> datasets.Dataset:
    """Write tables to one Arrow file, as they come, and open it as a dataset."""
    with ArrowWriter(path=str(path), features=features) as writer:
        for table in tables:
            writer.write_table(table, writer_batch_size=len(table))
        writer.finalize()
    return datasets.Dataset.from_file(str(path))


def save(rows: datasets.Dataset, folder: Path) -> None:
    """Write a prepared split as `datasets` loads it from disk."""
    with pages_given_back(rows.data.table):
        rows.save_to_disk(str(folder), max_shard_size="1GB")


def block_features(seq_len: int) -> datasets.Features:
    """The columns of a prepared split."""
    integer = datasets.Value("int32")
    return datasets.Features(
        {
            "input_ids": datasets.List(integer, length=seq_len + 1),
            "doc_lengths": datasets.List(integer),
            "checksum": datasets.Value("uint32"),
        }
    )


def block_tables(blocks: Iterable[Block], seq_len: int) -> Iterator[pa.Table]:
    """Gather blocks into tables of a few megabytes."""
    rows = 0
    for gathered in gather(blocks, lambda _: seq_len, _TOKENS_PER_TABLE):
        tokens = pa.array(np.concatenate([block.input_ids for block in gathered]))
        sums = [
            block_checksum(row, *(np.ascontiguousarray(part, dtype="<i4").tobytes() for part in block[:2]))
            for row, block in enumerate(gathered, start=rows)
        ]
        rows += len(gathered)
        columns = {
            "input_ids": pa.FixedSizeListArray.from_arrays(tokens, seq_len + 1),
            "doc_lengths": list_column([block.doc_lengths for block in gathered]),
            "checksum": pa.array(sums, type=pa.uint32()),
        }
        yield pa.table(columns)


def gather(items: Iterable[T], size: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Consecutive items in lists, each ended once its sizes add up to ``most``."""
    gathered: list[T] = []
    total = 0
    for item in items:
        gathered.append(item)
        total += size(item)
        if total >= most:
            yield gathered
            gathered, total = [], 0
    if gathered:
        yield gathered


def list_column(arrays: list[np.ndarray]) -> pa.Array:
    """Arrays (integers [n] each) as one Arrow column of int32 lists."""
    borders = np.cumsum([0, *map(len, arrays)], dtype=np.int64).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(borders), pa.array(np.concatenate(arrays).astype(np.int32)))
