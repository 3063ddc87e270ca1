"""Merges learned on, against the definition."""

import itertools
import random
from collections import Counter
from collections.abc import Callable

import pytest

from motifarch.tokenizer.merges import MergeLearner

Sequences = list[tuple[list[int], int]]


def by_definition(sequences: Sequences, number: int, may_merge: Callable[[int, int], bool]) -> list[tuple[int, int]]:
    """Counts all pairs anew for each merge."""
    found: list[tuple[int, int]] = []
    while len(found) < number:
        counts: Counter[tuple[int, int]] = Counter()
        for tokens, seen in sequences:
            for pair in itertools.pairwise(tokens):
                counts[pair] += seen
        candidates = [(-count, pair) for pair, count in counts.items() if count > 1 and may_merge(*pair)]
        if not candidates:
            break
        found.append(min(candidates)[1])
        for tokens, _ in sequences:
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == found[-1]:
                    tokens[i : i + 2] = [9 + len(found)]
                i += 1
    return found


@pytest.mark.parametrize("seed", range(30))
def test_merges_are_those_of_the_definition(seed: int) -> None:
    draw = random.Random(seed)
    letters = draw.choice([1, 2, 3, 8])
    sequences = [
        ([draw.randrange(letters) for _ in range(draw.randrange(30))], draw.randrange(1, 4))
        for _ in range(draw.randrange(1, 12))
    ]

    def may_merge(left: int, right: int) -> bool:
        return seed % 2 == 0 or (left + right) % 3 != 1

    found = [pair for pair, _ in itertools.islice(MergeLearner(sequences, may_merge).merges(10), 40)]
    assert found == by_definition(sequences, 40, may_merge)
