"""Tokens sent to the ranks that hold their experts, and what these make of them sent back (expert
parallelism).

Ranks of a group hold consecutive, equally many experts. A first all-to-all tells each rank how many
rows come to each of its experts; then messages have exactly the rows that they need, and none is
dropped. Sources: GShard, arXiv 2006.16668; Tutel, arXiv 2206.03382.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from motifarch.layers.recorded import recorded
from motifarch.layers.sorted_tokens import SortedTokens


def exchange_counts(counts: Tensor, group: ProcessGroup) -> Tensor:
    """How many rows come to this rank's experts: counts (experts,) of what each rank sends to
    (ranks, experts / ranks), by source.
    """
    share = [len(counts) // group.size()] * group.size()
    return _wait(_all_to_all(counts, share, share, group)).view(group.size(), -1)


def split_sizes(counts: Tensor, arriving: Tensor) -> tuple[list[int], list[int]]:
    """Rows that this rank sends to each rank and receives from it, read from the device: the one
    time a layer that the host waits for it.
    """
    sent, received = torch.stack((counts.view_as(arriving).sum(dim=1), arriving.sum(dim=1))).tolist()
    return sent, received


def _all_to_all(x: Tensor, received: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """Starts it; the result may be touched after :func:`_wait`."""
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), received, sent, group.group_name)  # type: ignore[no-any-return]


def _wait(x: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(x)  # type: ignore[no-any-return]


class _Message:
    """One all-to-all of rows, and its gradient's, each with a start and an end."""

    def __init__(self, received: list[int], sent: list[int], group: ProcessGroup) -> None:
        self.received, self.sent, self.group = received, sent, group
        self.gradient: Tensor | None = None

    def start(self, x: Tensor) -> Tensor:
        return _Start.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]

    def end(self, started: Tensor) -> Tensor:
        return _End.apply(started, self)  # type: ignore[no-any-return, no-untyped-call]


class _Start(torch.autograd.Function):
    """The start of a message, and the end of its gradient's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, message: _Message) -> Tensor:
        ctx.message = message  # type: ignore[attr-defined]
        return _all_to_all(x, message.received, message.sent, message.group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, _: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        message: _Message = ctx.message  # type: ignore[attr-defined]
        assert message.gradient is not None
        gradient, message.gradient = _wait(message.gradient), None
        return gradient, None


class _End(torch.autograd.Function):
    """The end of a message, and the start of its gradient's."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, started: Tensor, message: _Message) -> Tensor:
        ctx.message = message  # type: ignore[attr-defined]
        return _wait(started).view_as(started)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        message: _Message = ctx.message  # type: ignore[attr-defined]
        # Of other rows than grad, so autograd cannot pass it on.
        message.gradient = _all_to_all(grad, message.sent, message.received, message.group)
        return grad, None


class TokenExchange:
    """Which row of an expert's, on the rank that holds it, is which token's: as
    :class:`SortedTokens`, over the ranks of a group.

    All ranks make one together, and call each method together; one may have no tokens, or get no
    rows.

    Args:
        selected: (T, k) int64, each of this rank's tokens' experts; ``num_experts`` for none.
        weights: (T, k), theirs in a token's sum.
        num_experts: how many there are on all ranks; a multiple of the number of ranks.
        group: the ranks.
    """

    def __init__(self, selected: Tensor, weights: Tensor, num_experts: int, group: ProcessGroup) -> None:
        self._own = SortedTokens(selected, weights, num_experts)
        self.counts = self._own.counts
        """(num_experts,) int32, rows of this rank's tokens for each expert."""
        arriving = recorded(lambda: exchange_counts(self.counts, group))
        sent, received = recorded(lambda: split_sizes(self.counts, arriving))
        self._own.rows = sum(sent)  # those of no expert stay behind
        self._to_experts = _Message(received, sent, group)
        self._to_tokens = _Message(sent, received, group)
        self._arrived = SortedTokens(_local_experts(arriving, sum(received))[:, None], None, arriving.shape[1])
        self._first = arriving.shape[1] * group.rank()
        self.offsets = self._arrived.offsets
        """(num_experts / ranks,) int32, where the rows of each expert of this rank end."""

    @property
    def expert_of_row(self) -> Tensor:
        """(rows that this rank receives,) int64."""
        return self._first + self._arrived.expert_of_row

    def dispatch(self, x: Tensor) -> Tensor:
        """Starts to send this rank's tokens (T, E); work on others may go on before
        :meth:`receive`, which takes what is returned.
        """
        return self._to_experts.start(self._own.dispatch(x))

    def receive(self, dispatched: Tensor) -> Tensor:
        """The rows of this rank's experts, one expert after the other."""
        return self._arrived.dispatch(self._to_experts.end(dispatched))

    def combine(self, rows: Tensor) -> Tensor:
        """Sends what became of the received rows back: weighted sums of tokens' rows, (T, E)."""
        return self._own.combine(self._to_tokens.end(self._to_tokens.start(self._arrived.combine(rows))))


def _local_experts(arriving: Tensor, rows: int) -> Tensor:
    """The experts (rows,) of rows that arrive sorted by source, and by expert within each (sources,
    experts).
    """
    sources, local = arriving.shape
    index = torch.arange(local, device=arriving.device).repeat(sources)
    return index.repeat_interleave(arriving.flatten(), output_size=rows)
