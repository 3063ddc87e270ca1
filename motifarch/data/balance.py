"""A step's rows dealt to ranks so that they take about as long for attention.

Rows have equal numbers of tokens, and so equal work in everything but attention: there, documents
are apart, and a row of one long document sees many times the pairs of a row of short ones.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np

from motif_kernels.flops import visible_pairs


class AttentionWork:
    """A packed row's visible (query, key) pairs, summed over the layers of a model.

    Args:
        windows: of each layer, its inclusive (left, right) window; (-1, -1) for full attention.
    """

    def __init__(self, windows: Iterable[tuple[int, int]]) -> None:
        self._layers = Counter(windows)
        # Documents of one length come again and again: their pairs are counted once.
        self._of_document = cache(self._pairs)

    def __call__(self, doc_lengths: np.ndarray) -> int:
        """The work of a row whose documents have these lengths (`Block.doc_lengths`)."""
        *lengths, last = doc_lengths.tolist()
        return sum(map(self._of_document, lengths)) + self._of_document(last - 1)  # its end is a target only

    def _pairs(self, length: int) -> int:
        return sum(n * visible_pairs(length, length, True, window) for window, n in self._layers.items())


def deal(work: Sequence[int], ranks: int, micro_size: int) -> list[list[int]]:
    """Deals rows to ranks, as many to each, `micro_size` of them for each of its micro-batches.

    Ranks wait for one another in every layer of every micro-batch (FSDP gathers the layer there),
    so a step takes the sum over its micro-batches of the busiest rank's work. Therefore rows of
    like work meet in one micro-batch: sorted, and cut into its size. A rank's single row is then
    next to its like, which for `micro_size` 1 is the best there is; among more rows of a rank each
    goes to the rank with the least work that has room (longest processing time first, as Motif-3's
    report balances its packed rows), and rows that are alike leave little to even out. To balance
    the slots of all micro-batches at once, and to sort these then, was no better on real text.
    Among ranks with the same work, that with the least in earlier micro-batches comes first.

    Args:
        work: of each row; ranks that all compute it get the same answer. So many as the ranks
            share evenly.
        ranks: how many.
        micro_size: most rows in one model call; the last micro-batch may be smaller.

    Returns:
        Of each rank, its rows' places in `work`, in the order in which it takes them.
    """
    heaviest_first = sorted(range(len(work)), key=lambda row: -work[row])
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    total = [0] * ranks
    for start in range(0, len(work), ranks * micro_size):
        rows = heaviest_first[start : start + ranks * micro_size]
        full = len(dealt[0]) + len(rows) // ranks
        has_room = [(0, total[rank], rank) for rank in range(ranks)]
        heapq.heapify(has_room)
        for row in rows:
            load, before, rank = heapq.heappop(has_room)
            dealt[rank].append(row)
            total[rank] += work[row]
            if len(dealt[rank]) < full:
                heapq.heappush(has_room, (load + work[row], before, rank))
    return dealt
