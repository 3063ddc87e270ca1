"""Merkle trees: as RFC 6962's own examples and another implementation have them."""

import hashlib
import itertools
import random

import pymerkle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.ledger.merkle import EMPTY, is_in, leaf_hash, merged, proof, root, root_of, whole_subtrees

# The reference tree of Certificate Transparency's own tests.
INPUTS = [b"", b"\x00", b"\x10", b"\x20\x21", b"\x30\x31", b"@ABC", b"PQRSTUVW", b"`abcdefghijklmno"]
ROOTS = {
    1: "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    2: "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    3: "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    7: "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    8: "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
}


def leaves(count: int, seed: int = 0) -> list[bytes]:
    draw = random.Random(seed)
    return [leaf_hash(draw.randbytes(draw.randint(0, 40))) for _ in range(count)]


def test_roots_are_those_of_certificate_transparency() -> None:
    for count, expected in ROOTS.items():
        assert root([leaf_hash(entry) for entry in INPUTS[:count]]).hex() == expected
    assert root([]) == EMPTY == hashlib.sha256(b"").digest()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 100])
def test_roots_and_proofs_are_those_of_another_implementation(count: int) -> None:
    other = pymerkle.InmemoryTree(algorithm="sha256")
    entries = [f"entry {i}".encode() for i in range(count)]
    for entry in entries:
        other.append_entry(entry)
    hashed = [leaf_hash(entry) for entry in entries]
    assert root(hashed) == other.get_state()
    for place in range(count):
        path = proof(hashed, place)
        theirs = other.prove_inclusion(place + 1)
        assert path == theirs.path[1:]
        assert is_in(hashed[place], place, count, path, root(hashed))


@settings(deadline=None)
@given(st.integers(1, 200), st.lists(st.integers(0, 200), max_size=6), st.randoms())
def test_parts_hashed_apart_in_any_order_give_the_same_root(count: int, cuts: list[int], order: random.Random) -> None:
    hashed, bounds = leaves(count), sorted({0, count, *(c for c in cuts if c < count)})
    parts = [whole_subtrees(a, hashed[a:b]) for a, b in itertools.pairwise(bounds)]
    assert all(len(part) <= 2 * count.bit_length() for part in parts)
    order.shuffle(parts)
    assert root_of(merged(parts), count) == root(hashed)


@settings(deadline=None)
@given(st.integers(2, 100), st.data())
def test_a_proof_shows_nothing_else(count: int, data: st.DataObject) -> None:
    hashed = leaves(count)
    place, other = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, count - 1))
    path, top = proof(hashed, place), root(hashed)
    assert not is_in(leaf_hash(b"another"), place, count, path, top)
    assert is_in(hashed[place], other, count, path, top) == (place == other)
    assert not is_in(hashed[place], place, count, path[:-1], top)
    assert not is_in(hashed[place], place, count + 1, [*path, path[0]], top)


def test_what_is_missing_or_differs_is_named() -> None:
    hashed = leaves(5)
    with pytest.raises(ValueError, match="entry 2 of 5 is missing"):
        root_of(whole_subtrees(0, hashed[:2]) | whole_subtrees(3, hashed[3:]), 5)
    with pytest.raises(ValueError, match="differ about entry 4"):
        merged([whole_subtrees(4, hashed[4:]), whole_subtrees(4, hashed[:1])])
