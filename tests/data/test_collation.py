import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.data import Block, collate, pack


def block(tokens: list[int], lengths: list[int]) -> Block:
    return Block(np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int32))


def test_documents_inside_a_block_and_across_its_border() -> None:
    # The first block ends in the middle of a document, which goes on in the second; the second ends
    # with one token of the next document, which is a target of nothing there.
    batch = collate([block([1, 2, 3, 4, 5], [3, 2]), block([5, 6, 7, 8, 9], [2, 2, 1])])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch["shift_labels"].tolist() == [[2, 3, -100, 5, 6, -100, 8, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6, 8]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert type(batch["max_length_q"]) is int
    assert {batch[name].dtype for name in ("input_ids", "shift_labels", "position_ids")} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype == torch.int32


def test_one_document() -> None:
    batch = collate([block([4, 5, 6], [3])])
    assert batch["shift_labels"].tolist() == [[5, 6]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 2]


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=3, max_size=30), seq_len=st.integers(1, 12))
def test_each_token_is_a_target_of_its_own_predecessor_only(lengths: list[int], seq_len: int) -> None:
    borders = np.cumsum([0, *lengths]).tolist()
    stream = [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(borders)]
    blocks = list(pack(stream, seq_len))
    if not blocks:
        return
    batch = collate(blocks)
    inputs, labels = batch["input_ids"][0], batch["shift_labels"][0]
    total = len(blocks) * seq_len
    assert inputs.tolist() == list(range(total))  # in order, each once
    wanted = torch.arange(1, total + 1)
    wanted[torch.isin(wanted, torch.tensor(borders))] = -100
    assert torch.equal(labels, wanted)
    cu_seq_lens = batch["cu_seq_lens_q"]
    assert cu_seq_lens[-1] == total
    pieces = cu_seq_lens.diff()
    assert pieces.min() >= 1
    assert pieces.max() == batch["max_length_q"]
    assert torch.equal(batch["position_ids"][0], torch.cat([torch.arange(n) for n in pieces.tolist()]))
