"""Hashes of tensors that do not depend on which rank holds which part.

A tensor is a list of cells: its rows (along the first dimension), each cut into at most `SEGMENTS`
equal parts where they are wide, so that shards by rows and by columns hold whole cells. They are
listed with all rows of the first part before those of the second. A cell's hash is the BLAKE3 of
its bytes, little-endian, row-major. Each `GROUP` of cells in a row, their hashes one after the
other, is an entry of a Merkle tree: what is hashed apart is then long enough to be fast. Above the
tree stand dtype and shape: the tensor's hash is that of all three, and the hash of many tensors the
root over (name, hash) in the names' order.

Of a group that a shard does not hold whole, the cells' hashes travel; what it holds of a cell
travels as it is (`Piece`), of vectors and of narrow matrices, which are small.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor

from motifarch.ledger.merkle import Node, leaf_hash, merged, root, root_of, whole_subtrees

SEGMENTS = 8
"""Parts of a row, so that up to so many ranks of tensor parallelism hold whole cells."""
LEAST_BYTES = 4096
"""Of a part: a call for each smaller one would take longer than the hashing."""
GROUP = 64
"""Cells whose hashes are an entry of the tree."""


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
        segments = SEGMENTS
        while columns % segments or columns // segments * itemsize < LEAST_BYTES:
            segments //= 2
            if segments <= 1:
                return cls(rows, columns, 1)
        return cls(rows, columns, segments)

    @property
    def width(self) -> int:
        """Numbers in a cell."""
        return self.columns // self.segments

    @property
    def count(self) -> int:
        """Cells."""
        return self.rows * self.segments if self.columns else 0

    @property
    def groups(self) -> int:
        """Groups of cells; the last one may be smaller."""
        return -(-self.count // GROUP)

    def group_size(self, group: int) -> int:
        """Cells of a group."""
        return min(GROUP, self.count - group * GROUP)


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
    """Of whole groups."""
    hashes: dict[int, bytes] = field(default_factory=dict)
    """Of the other whole cells, by their place."""
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
    flat, stride, parts = block.reshape(-1).data, block.shape[1], []
    for column in range(begin, end, width):
        place = column // width * cells.rows + first_row
        at = (column - first_column) * itemsize
        starts = range(at, at + rows * stride, stride)
        hashes = [blake3(flat[start : start + width * itemsize]).digest() for start in starts]
        parts.append(_grouped(found, place, hashes))
    found.nodes = merged(parts)
    edges = [(first_column, min(begin, last_column)), (max(end, first_column), last_column)]
    for low, high in dict.fromkeys(edge for edge in edges if edge[0] < edge[1]):
        if begin <= low and high <= end:
            continue
        cut = block[:, (low - first_column) * itemsize : (high - first_column) * itemsize]
        found.pieces += [Piece(first_row + i, low, row.tobytes()) for i, row in enumerate(cut)]
    return found


def _grouped(found: TensorPart, place: int, hashes: list[bytes]) -> dict[Node, bytes]:
    """The subtrees of the whole groups among cells in a row; notes the hashes of the others."""
    cells = found.cells
    end = place + len(hashes)
    first, last = -(-place // GROUP), cells.groups if end == cells.count else end // GROUP
    leaves = []
    for group in range(first, last):
        start = group * GROUP - place
        leaves.append(leaf_hash(b"".join(hashes[start : start + cells.group_size(group)])))
    loose = range(place, min(first * GROUP, end)), range(max(first, last) * GROUP, end)
    found.hashes |= {at: hashes[at - place] for at in chain(*loose)}
    return whole_subtrees(first, leaves)


def _bytes(part: Tensor) -> npt.NDArray[np.uint8]:
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
    hashes = dict(_joined([piece for part in parts for piece in part.pieces], cells, first.dtype.itemsize))
    for part in parts:
        hashes |= part.hashes
    nodes = merged([*(part.nodes for part in parts), _whole_groups(hashes, cells)])
    about = {"dtype": str(first.dtype).removeprefix("torch."), "shape": list(first.shape)}
    return leaf_hash(json.dumps(about, sort_keys=True).encode() + root_of(nodes, cells.groups))


def _whole_groups(hashes: Mapping[int, bytes], cells: Cells) -> dict[Node, bytes]:
    """The groups that cells of several parts make up."""
    found: dict[Node, bytes] = {}
    for group in sorted({place // GROUP for place in hashes}):
        places = range(group * GROUP, group * GROUP + cells.group_size(group))
        if missing := [place for place in places if place not in hashes]:
            raise ValueError(f"cell {missing[0]} of {cells.count} is missing")
        found[0, group] = leaf_hash(b"".join(hashes[place] for place in places))
    return found


def _joined(pieces: Iterable[Piece], cells: Cells, itemsize: int) -> Iterator[tuple[int, bytes]]:
    """Place and hash of each cell that pieces make up."""
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
        yield segment * cells.rows + row, blake3(content).digest()


def whole_hash(tensor: Tensor) -> bytes:
    """The hash of a tensor that is here whole."""
    return tensor_hash([hash_part(tensor.detach().cpu(), [0] * tensor.ndim, tensor.shape)])


def state_root(hashes: Mapping[str, bytes]) -> bytes:
    """The root over tensors by name."""
    return root(state_leaves(hashes))


def state_leaves(hashes: Mapping[str, bytes]) -> list[bytes]:
    """The entries that a state's root is over, in the names' order."""
    return [leaf_hash(name.encode() + b"\0" + hashes[name]) for name in sorted(hashes)]
