"""Hashes of tensors that do not depend on which rank holds which part.

A tensor is a list of cells: its rows (along the first dimension), each cut into at most `SEGMENTS`
equal parts where they are wide, so that shards by rows and by columns hold whole cells. The cells
are the entries of a Merkle tree, all rows of the first part before those of the second. An entry is
the BLAKE3 hash of a cell's bytes, little-endian, row-major. Above it stand dtype and shape: the
tensor's hash is that of all three, and the hash of many tensors the root over (name, hash) in the
names' order.

What a shard holds of a cell without holding it whole travels as it is (`Piece`): of vectors and of
narrow matrices, which are small.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from motifarch.ledger.merkle import Node, leaf_hash, merged, root, root_of, whole_subtrees

SEGMENTS = 8
"""Parts of a row, so that up to so many ranks of tensor parallelism hold whole cells."""
LEAST_BYTES = 512
"""Of a part: hashing smaller ones would take longer than what is gained."""


@dataclass(frozen=True)
class Cells:
    """How a tensor is cut, which its shape and dtype decide alone."""

    rows: int
    columns: int
    segments: int

    @classmethod
    def of(cls, shape: Sequence[int], itemsize: int) -> "Cells":
        """A vector is one row."""
        rows = shape[0] if len(shape) > 1 else 1
        columns = prod(shape[1:] if len(shape) > 1 else shape)
        wide = columns % SEGMENTS == 0 and columns // SEGMENTS * itemsize >= LEAST_BYTES
        return cls(rows, columns, SEGMENTS if wide else 1)

    @property
    def width(self) -> int:
        """Numbers in a cell."""
        return self.columns // self.segments

    @property
    def count(self) -> int:
        """Cells."""
        return self.rows * self.segments if self.columns else 0


@dataclass(frozen=True)
class Piece:
    """A part of a cell: its row, its first column, and its bytes."""

    row: int
    column: int
    data: bytes


@dataclass
class TensorPart:
    """What is known of a tensor from some of its parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nodes: dict[Node, bytes] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def cells(self) -> Cells:
        """How it is cut."""
        return Cells.of(self.shape, self.dtype.itemsize)


def hash_part(part: Tensor, offsets: Sequence[int], shape: Sequence[int]) -> TensorPart:
    """Hashes a part of a tensor.

    Args:
        part: a block of it, on the CPU.
        offsets: where in it the block begins, in each dimension.
        shape: of the whole.
    """
    found = TensorPart(tuple(shape), part.dtype)
    cells = found.cells
    if not part.numel() or not cells.count:
        return found
    if len(shape) > 2 and tuple(part.shape[1:]) != tuple(shape[1:]):
        # Cut within what lies behind the first dimension: rows of it are not in one piece.
        return _scattered(found, part, offsets)
    first_row, first_column = (offsets[0], offsets[1] if len(shape) == 2 else 0) if len(shape) > 1 else (0, 0)
    if len(shape) < 2:
        first_column = offsets[0] if shape else 0
    rows = part.shape[0] if len(shape) > 1 else 1
    block = _bytes(part).reshape(rows, -1)
    itemsize, width = part.dtype.itemsize, cells.width
    last_column = first_column + block.shape[1] // itemsize
    begin = -(-first_column // width) * width
    end = last_column // width * width if last_column < cells.columns else cells.columns
    parts = []
    for column in range(begin, end, width):
        place = column // width * cells.rows + first_row
        at = (column - first_column) * itemsize
        parts.append(whole_subtrees(place, _hashed(block, at, width * itemsize)))
    found.nodes = merged(parts)
    edges = [(first_column, min(begin, last_column)), (max(end, first_column), last_column)]
    for low, high in dict.fromkeys(edge for edge in edges if edge[0] < edge[1]):
        if begin <= low and high <= end:
            continue
        cut = block[:, (low - first_column) * itemsize : (high - first_column) * itemsize]
        found.pieces += [Piece(first_row + i, low, row.tobytes()) for i, row in enumerate(cut)]
    return found


def _hashed(block: np.ndarray, at: int, count: int) -> Iterable[bytes]:
    """The leaves of a column of cells."""
    return (leaf_hash(blake3(memoryview(row)[at : at + count]).digest()) for row in block)


def _bytes(part: Tensor) -> np.ndarray:
    return part.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _scattered(found: TensorPart, part: Tensor, offsets: Sequence[int]) -> TensorPart:
    inner = found.shape[1:]
    starts = torch.arange(prod(inner)).reshape(inner)
    for axis, (offset, size) in enumerate(zip(offsets[1:], part.shape[1:], strict=True)):
        starts = starts.narrow(axis, offset, size)
    lines = starts.reshape(-1, starts.shape[-1])[:, 0].tolist()
    for i, row in enumerate(part):
        data = row.reshape(len(lines), -1)
        found.pieces += [
            Piece(offsets[0] + i, column, _bytes(line).tobytes()) for column, line in zip(lines, data, strict=True)
        ]
    return found


def tensor_hash(parts: Sequence[TensorPart]) -> bytes:
    """The hash of a tensor, of all its parts.

    Raises:
        ValueError: parts are missing, or differ.
    """
    first = parts[0]
    cells = first.cells
    joined = _joined([piece for part in parts for piece in part.pieces], cells, first.dtype.itemsize)
    nodes = merged([*(part.nodes for part in parts), *joined])
    about = {"dtype": str(first.dtype).removeprefix("torch."), "shape": list(first.shape)}
    return leaf_hash(json.dumps(about, sort_keys=True).encode() + root_of(nodes, cells.count))


def _joined(pieces: Iterable[Piece], cells: Cells, itemsize: int) -> Iterable[dict[Node, bytes]]:
    """Cells that pieces make up, each as the subtree that it is."""
    by_cell: dict[tuple[int, int], dict[int, bytes]] = {}
    for piece in pieces:
        at, data = piece.column, piece.data
        while data:  # a piece may reach over several cells
            segment = at // cells.width
            room = ((segment + 1) * cells.width - at) * itemsize
            by_cell.setdefault((segment, piece.row), {})[at] = data[:room]
            at, data = at + len(data[:room]) // itemsize, data[room:]
    for (segment, row), found in by_cell.items():
        content = b"".join(found[at] for at in sorted(found))
        if len(content) != cells.width * itemsize:
            raise ValueError(f"of row {row}, {len(content)} of {cells.width * itemsize} bytes are there")
        yield {(0, segment * cells.rows + row): leaf_hash(blake3(content).digest())}


def whole_hash(tensor: Tensor) -> bytes:
    """The hash of a tensor that is here whole."""
    return tensor_hash([hash_part(tensor.detach().cpu(), [0] * tensor.ndim, tensor.shape)])


def state_root(hashes: Mapping[str, bytes]) -> bytes:
    """The root over tensors by name."""
    return root(state_leaves(hashes))


def state_leaves(hashes: Mapping[str, bytes]) -> list[bytes]:
    """The entries that a state's root is over, in the names' order."""
    return [leaf_hash(name.encode() + b"\0" + hashes[name]) for name in sorted(hashes)]
