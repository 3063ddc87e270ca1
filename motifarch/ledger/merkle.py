"""Merkle trees as of RFC 6962 (Certificate Transparency): one hash for a list, of which each entry
can be shown to be in it with a few hashes and without the rest.

Parts of a list can be hashed apart, in any order, and joined: what several ranks hold has the hash
that one would find. Hashes are SHA-256, 32 bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

Node = tuple[int, int]
"""A whole subtree: its height, and its place among those of that height. It has the entries from
``place * 2**height`` on, 2**height of them.
"""

EMPTY = hashlib.sha256(b"").digest()
"""The root of an empty list."""


def leaf_hash(entry: bytes) -> bytes:
    """The hash of an entry by itself."""
    return hashlib.sha256(b"\0" + entry).digest()


def join(left: bytes, right: bytes) -> bytes:
    """The hash of two subtrees side by side."""
    return hashlib.sha256(b"\1" + left + right).digest()


def whole_subtrees(start: int, leaves: Iterable[bytes]) -> dict[Node, bytes]:
    """The fewest whole subtrees that cover entries in a row.

    Args:
        start: the first one's place in the list.
        leaves: their hashes, in order.

    Returns:
        At most two of each height.
    """
    found: dict[Node, bytes] = {}
    for place, digest in enumerate(leaves, start):
        add_subtree(found, (0, place), digest)
    return found


def merged(parts: Iterable[Mapping[Node, bytes]]) -> dict[Node, bytes]:
    """What parts of one list have together.

    Raises:
        ValueError: two parts differ about the same entries.
    """
    given: dict[Node, bytes] = {}
    for node, digest in (pair for part in parts for pair in part.items()):
        if given.setdefault(node, digest) != digest:
            raise ValueError(f"two parts differ about {_words(node)}")
    found: dict[Node, bytes] = {}
    for node in sorted(given):
        add_subtree(found, node, given[node])
    return found


def add_subtree(found: dict[Node, bytes], node: Node, digest: bytes) -> None:
    """Adds a subtree, and joins it with its neighbour as often as there is one."""
    height, place = node
    while (twin := found.pop((height, place ^ 1), None)) is not None:
        digest = join(twin, digest) if place % 2 else join(digest, twin)
        height, place = height + 1, place // 2
    found[height, place] = digest


def root_of(nodes: Mapping[Node, bytes], size: int) -> bytes:
    """The root of a list of which all entries are covered.

    Raises:
        ValueError: an entry is not.
    """

    def subtree(start: int, count: int) -> bytes:
        height = count.bit_length() - 1
        if count == 1 << height and (digest := nodes.get((height, start >> height))) is not None:
            return digest
        if count == 1:
            raise ValueError(f"entry {start} of {size} is missing")
        left = 1 << (count - 1).bit_length() - 1
        return join(subtree(start, left), subtree(start + left, count - left))

    return subtree(0, size) if size else EMPTY


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over hashes of entries."""
    return root_of(whole_subtrees(0, leaves), len(leaves))


def proof(leaves: Sequence[bytes], place: int) -> list[bytes]:
    """The hashes that show that an entry is in the list, the nearest first."""

    def path(start: int, count: int) -> Iterator[bytes]:
        if count == 1:
            return
        left = 1 << (count - 1).bit_length() - 1
        if place < start + left:
            yield from path(start, left)
            yield root(leaves[start + left : start + count])
        else:
            yield from path(start + left, count - left)
            yield root(leaves[start : start + left])

    if not 0 <= place < len(leaves):
        raise ValueError(f"the list has {len(leaves)} entries, and none at {place}")
    return list(path(0, len(leaves)))


def is_in(leaf: bytes, place: int, size: int, path: Sequence[bytes], expected: bytes) -> bool:
    """Whether a proof shows that an entry is at a place of a list with a root."""
    if not 0 <= place < size:
        return False
    turns: list[bool] = []  # whether the entry is on the right, from the root down
    start, count = 0, size
    while count > 1:
        left = 1 << (count - 1).bit_length() - 1
        turns.append(place >= start + left)
        start, count = (start + left, count - left) if turns[-1] else (start, left)
    if len(path) != len(turns):
        return False
    digest = leaf
    for other, on_the_right in zip(path, reversed(turns), strict=True):
        digest = join(other, digest) if on_the_right else join(digest, other)
    return digest == expected


def _words(node: Node) -> str:
    height, place = node
    return f"entry {place}" if height == 0 else f"entries {place << height} to {((place + 1) << height) - 1}"
