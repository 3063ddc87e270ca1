"""The Merkle root over a split's rows, of which one can be shown to be there without the rest.

A row's entry in the tree is the BLAKE3 hash of its int32 tokens and, after them, of its documents'
lengths, little-endian, as they are stored.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from motifarch.data.loss_mask import with_mask
from motifarch.data.packed import Block, PackedDataset
from motifarch.errors import UserError
from motifarch.ledger.merkle import Node, add_subtree, is_in, leaf_hash, proof, root, root_of
from motifarch.progress import progress


class RowTree:
    """Hashes rows as they go by; memory grows with the logarithm of their number."""

    def __init__(self) -> None:
        self._nodes: dict[Node, bytes] = {}
        self._rows = 0

    def over(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """The same blocks, as they are stored; each is an entry."""
        for block in blocks:
            add_subtree(self._nodes, (0, self._rows), row_leaf(block))
            self._rows += 1
            yield block

    def root(self) -> str:
        """The root over those gone by, hexadecimal."""
        return root_of(self._nodes, self._rows).hex()


def row_leaf(block: Block) -> bytes:
    """A row's entry; of a block as it is stored, or as it is read."""
    input_ids = block.input_ids
    if block.loss_mask is not None:
        input_ids = with_mask(input_ids, block.loss_mask)
    parts = (np.ascontiguousarray(part, dtype="<i4").tobytes() for part in (input_ids, block.doc_lengths))
    return leaf_hash(blake3(b"".join(parts)).digest())


def prove(folder: Path, split: str, row: int) -> dict[str, Any]:
    """What shows, without the other rows, that a row is in prepared data; all rows are read.

    Args:
        folder: a prepared one.
        split: "train" or "validation".
        row: its number.

    Raises:
        UserError: there is no such row, or the data is damaged.
    """
    data = PackedDataset.open(folder, split)
    if not 0 <= row < len(data):
        raise UserError(f"--row {row} is not in {folder / split}; its rows are 0 to {len(data) - 1}")
    with progress("hashing rows", len(data)) as advance:
        leaves = []
        for index in range(len(data)):
            leaves.append(row_leaf(data[index]))
            advance()
    block = data[row]
    stored = block.input_ids if block.loss_mask is None else with_mask(block.input_ids, block.loss_mask)
    return {
        "split": split,
        "row": row,
        "rows": len(data),
        "input_ids": stored.tolist(),
        "doc_lengths": block.doc_lengths.tolist(),
        "path": [digest.hex() for digest in proof(leaves, row)],
        "root": root(leaves).hex(),
    }


def proves(content: Any, expected: str) -> bool:
    """Whether what `prove` gave shows its row to be in the split with a root."""
    try:
        block = Block(np.array(content["input_ids"], dtype="<i4"), np.array(content["doc_lengths"], dtype="<i4"))
        path = [bytes.fromhex(digest) for digest in content["path"]]
        return is_in(row_leaf(block), content["row"], content["rows"], path, bytes.fromhex(expected))
    except (KeyError, TypeError, ValueError, OverflowError):
        return False
