import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.data import Block, pack
from motifarch.data.packing import BlockPacker

documents_lists = st.lists(st.integers(1, 30), max_size=40)


def numbered(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are their places in the stream."""
    borders = itertools.pairwise(np.cumsum([0, *lengths]).tolist())
    return [np.arange(begin, end, dtype=np.int32) for begin, end in borders]


def unpack(blocks: list[Block]) -> list[int]:
    return [*blocks[0].input_ids[:1].tolist(), *(t for block in blocks for t in block.input_ids[1:].tolist())]


@settings(deadline=None)
@given(lengths=documents_lists, seq_len=st.integers(1, 17))
def test_unpacking_restores_the_documents(lengths: list[int], seq_len: int) -> None:
    documents = numbered(lengths)
    blocks = list(pack(documents, seq_len))
    total = sum(lengths)
    assert len(blocks) == max(0, (total - 1) // seq_len)
    if not blocks:
        return
    assert unpack(blocks) == list(range(len(blocks) * seq_len + 1))
    starts = {int(document[0]) for document in documents}
    for number, block in enumerate(blocks):
        assert block.input_ids.dtype == block.doc_lengths.dtype == np.int32
        assert block.input_ids.shape == (seq_len + 1,)
        assert block.doc_lengths.min() >= 1
        assert block.doc_lengths.sum() == seq_len + 1
        begins = number * seq_len + np.cumsum([0, *block.doc_lengths[:-1]])
        inside = set(range(number * seq_len, (number + 1) * seq_len + 1))
        assert set(begins.tolist()) == (starts & inside) | {number * seq_len}


@settings(deadline=None)
@given(lengths=documents_lists, seq_len=st.integers(1, 17))
def test_every_token_but_a_documents_first_is_a_target_once(lengths: list[int], seq_len: int) -> None:
    targets: list[int] = []
    documents = numbered(lengths)
    blocks = list(pack(documents, seq_len))
    for block in blocks:
        for piece in np.split(block.input_ids, np.cumsum(block.doc_lengths)[:-1]):
            targets += piece[1:].tolist()
    firsts = {int(document[0]) for document in documents}
    covered = range(len(blocks) * seq_len + 1) if blocks else range(0)
    assert targets == [token for token in covered if token not in firsts]


def test_counts() -> None:
    packer = BlockPacker(4)
    blocks = [block for document in numbered([3, 5, 4]) for block in packer.add(document)]
    assert (packer.documents, packer.tokens, packer.blocks, packer.leftover) == (3, 12, len(blocks), 3)
    assert packer.blocks == 2


def test_blocks_do_not_change_afterwards() -> None:
    blocks = list(pack(numbered([9]), 4))
    assert blocks[0].input_ids.tolist() == [0, 1, 2, 3, 4]
    assert blocks[1].input_ids.tolist() == [4, 5, 6, 7, 8]
