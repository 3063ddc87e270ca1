"""Tokens sorted by expert, and what experts make of them summed up by token."""

from typing import Protocol

import torch
from torch import Tensor

from motifarch.layers.permute import permute
from motifarch.layers.recorded import recorded


class ExpertRows(Protocol):
    """Rows of tokens for experts: on one rank (:class:`SortedTokens`), or exchanged between ranks
    (`motifarch.layers.token_exchange`).
    """

    counts: Tensor
    """(num_experts,) int32, rows of this rank's tokens for each expert."""
    expert_of_row: Tensor
    """(rows,) int64, of those that :meth:`receive` gives."""
    offsets: Tensor
    """int32, where the rows of each of this rank's experts end."""

    def dispatch(self, x: Tensor) -> Tensor:
        """Starts to send tokens (T, E); other work may go on before :meth:`receive`."""

    def receive(self, dispatched: Tensor) -> Tensor:
        """The rows of this rank's experts, one expert after the other: (rows, E)."""

    def combine(self, rows: Tensor) -> Tensor:
        """The weighted sums of what experts made of tokens' rows: (rows, E) to (T, E)."""


class SortedTokens:
    """Which row of an expert's is which token's.

    A token has a slot for each of its experts; the rows are the (token, slot) pairs sorted by
    expert, tokens in their order.

    Args:
        selected: (T, k) int64, each token's experts; ``num_experts`` for none.
        weights: (T, k), theirs in a token's sum.
        num_experts: how many there are.
    """

    def __init__(self, selected: Tensor, weights: Tensor, num_experts: int) -> None:
        self._weights = weights
        self.slots = selected.shape[1]
        self._order, self._inverse, self.expert_of_row, self.offsets = recorded(lambda: _sort(selected, num_experts))
        """Of expert_of_row (T k) int64, ``num_experts`` for rows of none; of offsets (num_experts,)
        int32, where each expert's rows end."""
        self.counts = self.offsets.diff(prepend=self.offsets.new_zeros(1))
        """(num_experts,) int32, rows of each expert."""

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens (T, E) to rows (T k, E)."""
        pairs = x.repeat_interleave(self.slots, dim=0)
        return permute(pairs, self._order, self._inverse)

    def receive(self, dispatched: Tensor) -> Tensor:
        """The same rows: nothing was on its way."""
        return dispatched

    def combine(self, rows: Tensor) -> Tensor:
        """The weighted sums of tokens' rows: (T k, E) to (T, E)."""
        pairs = permute(rows, self._inverse, self._order)
        return (self._weights[..., None] * pairs.unflatten(0, (-1, self.slots))).sum(dim=1)


def _sort(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The slots' order by expert, the inverse of that, the sorted experts, where each ends."""
    experts, order = selected.flatten().sort(stable=True)
    index = torch.arange(num_experts, device=selected.device)
    return order, order.argsort(), experts, torch.searchsorted(experts, index, right=True, out_int32=True)
