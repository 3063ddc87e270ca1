"""Hashes of tensors: the same however they are cut, and another for every other content."""

import itertools
import random

import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from motifarch.ledger.merkle import leaf_hash, root
from motifarch.ledger.tensor_hash import hash_part, state_root, tensor_hash, whole_hash

SHAPES = [(), (0,), (1,), (7,), (5000,), (3, 5), (40, 1024), (17, 3072), (64, 8192), (6, 24, 40), (4, 2, 3, 130)]


def tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def blocks(shape: tuple[int, ...], cuts: list[list[int]]) -> list[tuple[tuple[int, int], ...]]:
    """(start, end) in each dimension, of every block between the cuts."""
    bounds = [sorted({0, size, *(c for c in cut if c < size)}) for size, cut in zip(shape, cuts, strict=True)]
    return list(itertools.product(*(list(itertools.pairwise(b)) for b in bounds)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", SHAPES)
def test_any_layout_gives_the_same_hash(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    whole, draw = tensor(shape, dtype), random.Random(0)
    expected = whole_hash(whole)
    for _ in range(8):
        cuts = [[draw.randint(0, size) for _ in range(draw.randint(0, 3))] for size in shape]
        parts = []
        for block in blocks(shape, cuts):
            index = tuple(slice(a, b) for a, b in block)
            parts.append(hash_part(whole[index], [a for a, _ in block], shape))
        draw.shuffle(parts)
        assert tensor_hash(parts or [hash_part(whole, [0] * whole.ndim, shape)]) == expected


@pytest.mark.parametrize(("rows", "columns", "segments"), [(3, 2048, 2), (40, 8192, 8), (70, 24, 1), (130, 1000, 1)])
def test_a_tensors_hash_is_what_its_description_says(rows: int, columns: int, segments: int) -> None:
    whole = tensor((rows, columns))
    width = columns // segments
    cells = [whole[row, width * k : width * (k + 1)] for k in range(segments) for row in range(rows)]
    hashes = [blake3(cell.numpy().tobytes()).digest() for cell in cells]
    tree = root([leaf_hash(b"".join(hashes[i : i + 64])) for i in range(0, len(hashes), 64)])
    about = f'{{"dtype": "float32", "shape": [{rows}, {columns}]}}'
    assert whole_hash(whole) == leaf_hash(about.encode() + tree)


@settings(deadline=None)
@given(st.integers(0, 39), st.integers(0, 1023), st.sampled_from(["value", "sign", "swap"]))
def test_any_change_changes_it(row: int, column: int, kind: str) -> None:
    whole = tensor((40, 1024))
    changed = whole.clone()
    if kind == "value":
        changed[row, column] += 1
    elif kind == "sign":
        changed[row, column] *= -1
    else:
        changed[[row, (row + 1) % 40]] = changed[[(row + 1) % 40, row]]
    assert whole_hash(changed) != whole_hash(whole)


def test_shape_and_dtype_count_too() -> None:
    whole = torch.zeros(4, 6)
    others = [whole.reshape(6, 4), whole.reshape(-1), whole.to(torch.int32), torch.zeros(4, 6, dtype=torch.float64)]
    assert len({whole_hash(t) for t in (whole, *others)}) == 5


def test_a_missing_part_is_named() -> None:
    whole = tensor((40, 1024))
    with pytest.raises(ValueError, match=r"cell \d+ of 40 is missing"):
        tensor_hash([hash_part(whole[:20], [0, 0], whole.shape)])
    with pytest.raises(ValueError, match=r"of row 0, 12 of 28 bytes are there"):
        tensor_hash([hash_part(tensor((7,))[:3], [0], (7,))])


def test_names_count_in_a_states_root() -> None:
    one, two = whole_hash(tensor((3,))), whole_hash(tensor((4,)))
    assert state_root({"a": one, "b": two}) == state_root({"b": two, "a": one})
    assert state_root({"a": one, "b": two}) != state_root({"a": two, "b": one})
