"""Sums over the training sequences that lie one after the other in a row of tokens."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from motifarch.layers.group_sum import sum_over


class Sequences:
    """Where the sequences of a row lie in the part of it that this rank has.

    Ranks' parts need not begin where a sequence does.

    Args:
        length: S, tokens of the part.
        sequence_length: tokens of a sequence, the last of a row may have fewer; None for a row that
            is one sequence.
        group: ranks that hold the parts of the row, as long as this one, in their order; None where
            the part is the row.
    """

    def __init__(self, length: int, sequence_length: int | None, group: ProcessGroup | None) -> None:
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        each = ranks * length if sequence_length is None else sequence_length
        start, end = rank * length, (rank + 1) * length
        self._group = group
        self._first, self._count = start // each, -(-ranks * length // each)
        borders = [start, *range((self._first + 1) * each, end, each), end]
        self._lengths = [after - before for before, after in pairwise(borders)]

    def each(self, tokens: Tensor) -> Sequence[Tensor]:
        """Tokens (B, S, ...) of the part, sequence by sequence."""
        return tokens.split(self._lengths, dim=1)

    def sums(self, own: Sequence[Sequence[Tensor]]) -> Sequence[Tensor]:
        """Of each sequence of the part sums (B, n) over its tokens, of any n each -> (B, sequences
        of the row, n).

        Ranks of the group call it together, and send each other one message.
        """
        after = self._count - self._first - len(self._lengths)
        of_part = torch.stack([torch.cat(list(sums), dim=-1) for sums in own], dim=1)
        whole = sum_over(pad(of_part, (0, 0, self._first, after)), self._group)
        return whole.split([term.shape[-1] for term in own[0]], dim=-1)

    def spread(self, values: Tensor) -> Tensor:
        """(B, sequences of the row, n) -> (B, S, n): each token of the part has its sequence's."""
        own = values[:, self._first :].split(1, dim=1)
        tokens = [value.expand(-1, count, -1) for value, count in zip(own, self._lengths, strict=False)]
        return torch.cat(tokens, dim=1)
