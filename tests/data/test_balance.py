"""Rows dealt to ranks by their attention work."""

import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from motif_kernels.flops import visible_pairs
from motifarch.data import AttentionWork, pack
from motifarch.data.balance import deal

MOTIF_3 = [(-1, -1)] * 14 + [(128, 0)] * 40
"""The windows of its layers, with that of multi-token prediction."""


def busiest(work: list[int], dealt: list[list[int]], micro_size: int) -> int:
    """The sum over micro-batches of the busiest rank's work."""
    places = range(0, len(dealt[0]), micro_size)
    return sum(max(sum(work[row] for row in rank[i : i + micro_size]) for rank in dealt) for i in places)


def in_order(rows: int, ranks: int) -> list[list[int]]:
    share = rows // ranks
    return [list(range(rank * share, (rank + 1) * share)) for rank in range(ranks)]


def test_work_is_that_of_the_documents_as_the_model_sees_them() -> None:
    work = AttentionWork([(-1, -1), (2, 0), (2, 0)])
    # The row's last token is a target alone: documents of 5, 1 and 3 positions.
    full, window = visible_pairs([5, 1, 3], [5, 1, 3], True), visible_pairs([5, 1, 3], [5, 1, 3], True, (2, 0))
    assert (full, window) == (15 + 1 + 6, 12 + 1 + 6)
    assert work(np.array([5, 1, 4])) == full + 2 * window
    assert work(np.array([5, 4, 1])) == 15 + 2 * 12 + 10 + 2 * 9


@pytest.mark.parametrize(("rows", "ranks", "micro_size"), [(24, 3, 4), (24, 4, 4), (8, 8, 1), (10, 1, 3), (6, 2, 8)])
def test_each_row_is_dealt_once_and_micro_batches_keep_their_size(rows: int, ranks: int, micro_size: int) -> None:
    work = [random.Random(row).randint(1, 5) for row in range(rows)]  # many are equal
    dealt = deal(work, ranks, micro_size)
    assert {len(rank) for rank in dealt} == {rows // ranks}
    assert sorted(row for rank in dealt for row in rank) == list(range(rows))
    assert deal(work, ranks, micro_size) == dealt
    assert busiest(work, dealt, micro_size) <= busiest(work, in_order(rows, ranks), micro_size)


def test_single_rows_meet_their_like() -> None:
    # Of all pairings, 9 with 8, 5 with 4 and 2 with 1 alone take no more than 9 + 5 + 2; and none
    # of the ranks gets all the longer ones.
    assert deal([1, 5, 9, 2, 8, 4], 2, 1) == [[2, 5, 3], [4, 1, 0]]


@pytest.fixture(scope="module")
def library() -> Callable[[int], list[int]]:
    """The attention work of rows of the standard library's sources, a token for four bytes."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if "-packages" not in str(path))
    random.Random(0).shuffle(files)
    documents = [np.frombuffer(path.read_bytes(), np.uint8)[::4] for path in files]
    work = AttentionWork(MOTIF_3)

    def of_rows(seq_len: int) -> list[int]:
        return [work(block.doc_lengths) for block in pack((d for d in documents if d.size), seq_len)]

    return of_rows


@pytest.mark.parametrize(
    ("seq_len", "ranks", "micro_size", "before", "after"),
    [(4096, 8, 1, 1.15, 1.12), (4096, 8, 4, 1.12, 1.02), (32768, 8, 1, 1.8, 1.35), (32768, 8, 2, 1.5, 1.10)],
)
def test_real_text_waits_less(
    library: Callable[[int], list[int]], seq_len: int, ranks: int, micro_size: int, before: float, after: float
) -> None:
    rows = library(seq_len)
    size = ranks * micro_size * 4
    batches = [random.Random(step).sample(rows, size) for step in range(10)]
    assert len(rows) > size
    # Time of a step over that of ranks which are all equally busy.
    waits = {
        name: np.mean([busiest(work, dealt(work), micro_size) * ranks / sum(work) for work in batches])
        for name, dealt in {
            "in order": lambda work: in_order(len(work), ranks),
            "balanced": lambda work: deal(work, ranks, micro_size),
        }.items()
    }
    assert waits["in order"] > before
    assert waits["balanced"] < after
