"""Byte-pair merges, learned on from a vocabulary that exists.

`tokenizers` trains a vocabulary from nothing. This trainer goes on from sequences of tokens: across
spaces (SuperBPE), or from a vocabulary that someone else trained (extension).
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

Pair = tuple[int, int]


class MergeLearner:
    """Sequences of tokens, in which the most frequent pair is merged again and again.

    Of pairs that are equally frequent the one with the smallest ids is merged, so that the same
    sequences give the same merges. Pairs never reach from one sequence into another.

    Source: byte-pair encoding, Sennrich et al., arXiv 1508.07909. Counts are kept as merges change
    them, and the places of a pair are looked at when it is merged.

    Args:
        sequences: tokens, and how often the sequence was seen.
        may_merge: whether a pair may become a token, as things stand.
    """

    def __init__(self, sequences: Iterable[tuple[Sequence[int], int]], may_merge: Callable[[int, int], bool]) -> None:
        self._may_merge = may_merge
        # All sequences one after another, -1 between them. A place that a merge emptied is skipped
        # by its neighbours' links.
        self._tokens, self._weights = array("i", [-1]), array("q", [0])
        for sequence, seen in sequences:
            self._tokens.extend(sequence)
            self._tokens.append(-1)
            self._weights.extend([seen] * (len(sequence) + 1))
        self._next = array("i", range(1, len(self._tokens) + 1))
        self._previous = array("i", range(-1, len(self._tokens) - 1))
        self._counts: dict[Pair, int] = {}
        self._places: dict[Pair, array[int]] = {}
        for place in range(1, len(self._tokens) - 1):
            self._add(place, self._tokens[place], self._tokens[place + 1])
        self._heap = [(-count, pair) for pair, count in self._counts.items() if may_merge(*pair)]
        heapq.heapify(self._heap)

    def merges(self, first_id: int) -> Iterator[tuple[Pair, int]]:
        """Pairs with how often each was seen, most frequent first; the first becomes token
        ``first_id``. Ends where no pair is left that was seen twice.
        """
        while self._heap:
            count, pair = heapq.heappop(self._heap)
            now = self._counts.get(pair, 0)
            if -count != now:
                if now > 1:
                    heapq.heappush(self._heap, (-now, pair))
                continue
            if now < 2:
                return
            if not self._may_merge(*pair):  # another pair became the same token
                continue
            yield pair, now
            self._merge(pair, first_id)
            first_id += 1

    def _add(self, place: int, left: int, right: int) -> None:
        if left < 0 or right < 0:
            return
        pair = left, right
        self._counts[pair] = self._counts.get(pair, 0) + self._weights[place]
        places = self._places.get(pair)
        if places is None:
            places = self._places[pair] = array("i")
        places.append(place)

    def _merge(self, pair: Pair, new: int) -> None:
        left, right = pair
        tokens, following, previous, weights = self._tokens, self._next, self._previous, self._weights
        touched: set[Pair] = set()
        for place in sorted(self._places.pop(pair)):
            other = following[place]
            # Merged meanwhile, as the middle of three equal tokens is.
            if tokens[place] != left or tokens[other] != right:
                continue
            weight, before, after = weights[place], previous[place], following[other]
            for gone in ((tokens[before], left), (right, tokens[after])):
                if gone in self._counts:
                    self._counts[gone] -= weight
            tokens[place], tokens[other] = new, -2
            following[place], previous[after] = after, place
            for start, new_pair in ((before, (tokens[before], new)), (place, (new, tokens[after]))):
                self._add(start, *new_pair)
                touched.add(new_pair)
        del self._counts[pair]
        for new_pair in touched:
            count = self._counts.get(new_pair, 0)
            if count > 1 and self._may_merge(*new_pair):
                heapq.heappush(self._heap, (-count, new_pair))
