"""Tokens sorted by expert, and what experts make of them summed up by token."""

from typing import Protocol

import torch
from torch import Tensor

from motif_kernels import combine_rows, dispatch_rows, sort_by_expert
from motifarch.layers.recorded import RecordedOperator


def _sort_fake(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(selected), selected.new_empty(num_experts, dtype=torch.int32)


_sort = RecordedOperator("motifarch::sort_by_expert", sort_by_expert, _sort_fake)


class ExpertRows(Protocol):
    """Rows of tokens for experts: on one rank (:class:`SortedTokens`), or exchanged between ranks
    (`motifarch.layers.token_exchange`).
    """

    counts: Tensor
    """(num_experts,) int32, rows of this rank's tokens for each expert."""
    offsets: Tensor
    """int32, where the rows of each of this rank's experts end."""

    @property
    def expert_of_row(self) -> Tensor:
        """(rows,) int64, of those that :meth:`receive` gives; ``num_experts`` for none."""

    def dispatch(self, x: Tensor) -> Tensor:
        """Starts to send tokens (T, E); other work may go on before :meth:`receive`."""

    def receive(self, dispatched: Tensor) -> Tensor:
        """The rows of this rank's experts, one expert after the other: (rows, E)."""

    def combine(self, rows: Tensor) -> Tensor:
        """The weighted sums of what experts made of tokens' rows: (rows, E) to (T, E)."""


class SortedTokens:
    """Which row of an expert's is which token's.

    A token has a slot for each of its experts; the rows are the (token, slot) pairs sorted by
    expert, tokens in their order, those of no expert last.

    Args:
        selected: (T, k) int64, each token's experts; ``num_experts`` for none.
        weights: (T, k), theirs in a token's sum; None for sums without.
        num_experts: how many there are.

    Attributes:
        rows: how many there are; T k when made, less where those of no expert are left out.
    """

    def __init__(self, selected: Tensor, weights: Tensor | None, num_experts: int) -> None:
        self._weights = weights
        self._places, self.offsets = _sort(selected, num_experts)
        """Of offsets (num_experts,) int32, where each expert's rows end."""
        self.rows = selected.shape[0] * selected.shape[1]
        self.counts = self.offsets.diff(prepend=self.offsets.new_zeros(1))
        """(num_experts,) int32, rows of each expert."""

    @property
    def expert_of_row(self) -> Tensor:
        """(rows,) int64; ``num_experts`` for rows of none."""
        index = torch.arange(self.rows, device=self.offsets.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets, index, right=True)

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens (T, E) to rows (rows, E)."""
        return dispatch_rows(x, self._places, self.offsets, rows=self.rows)

    def receive(self, dispatched: Tensor) -> Tensor:
        """The same rows: nothing was on its way."""
        return dispatched

    def combine(self, rows: Tensor) -> Tensor:
        """The weighted sums of tokens' rows: (rows, E) to (T, E)."""
        return combine_rows(rows, self._weights, self._places, self.offsets)
