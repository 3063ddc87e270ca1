"""Tokens exchanged by DeepEP's kernels, over NVLink and RDMA: https://github.com/deepseek-ai/DeepEP.

A token goes once to each rank that holds any of its experts, and comes back as one sum: less is
sent than a row for each expert. It is for bfloat16 on CUDA, and the sums that come back are rounded
to that. Interface: `deep_ep.Buffer` with `get_dispatch_layout`, `dispatch` and `combine`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from motifarch.layers.sorted_tokens import SortedTokens

_buffers: dict[ProcessGroup, Any] = {}


def _buffer(group: ProcessGroup, x: Tensor) -> Any:
    """The group's memory for messages, large enough for tokens such as these (T, E)."""
    from deep_ep import Buffer

    row_bytes, ranks = x.shape[1] * x.itemsize, group.size()
    configs = Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks)
    nvlink = max(config.get_nvl_buffer_size_hint(row_bytes, ranks) for config in configs)
    network = max(config.get_rdma_buffer_size_hint(row_bytes, ranks) for config in configs)
    made = _buffers.get(group)
    if made is None or made.num_nvl_bytes < nvlink or made.num_rdma_bytes < network:
        _buffers[group] = Buffer(group, nvlink, network)
    return _buffers[group]


class DeepEPExchange:
    """As :class:`TokenExchange`, by DeepEP: each rank adds up what its experts make of a token, so
    the weights travel too.

    Args:
        selected: (T, k) int64, each of this rank's tokens' experts; ``num_experts`` for none.
        weights: (T, k), theirs in a token's sum.
        num_experts: how many there are on all ranks; a multiple of the number of ranks.
        group: the ranks.
    """

    counts: Tensor
    offsets: Tensor

    def __init__(self, selected: Tensor, weights: Tensor, num_experts: int, group: ProcessGroup) -> None:
        self._selected = selected.masked_fill(selected == num_experts, -1)
        self._weights = weights.float()
        self._num_experts, self._group = num_experts, group
        self._handle: Any = None
        self._event: Any = None
        self._arrived: tuple[Tensor, Tensor, list[int]] | None = None

    @property
    def expert_of_row(self) -> Tensor:
        """(rows that this rank receives,) int64."""
        return self._sorted.expert_of_row + len(self.offsets) * self._group.rank()

    def dispatch(self, x: Tensor) -> Tensor:
        """Starts to send this rank's tokens (T, E); touch the rows only after :meth:`receive`."""
        received, weights = _Dispatch.apply(x, self._weights, self)  # type: ignore[no-untyped-call]
        assert self._arrived is not None
        self._arrived = (self._arrived[0], weights, self._arrived[2])
        return received  # type: ignore[no-any-return]

    def receive(self, dispatched: Tensor) -> Tensor:
        """The rows of this rank's experts, one expert after the other."""
        assert self._arrived is not None
        self._event.current_stream_wait()
        selected, weights, sizes = self._arrived
        local = self._num_experts // self._group.size()
        self._sorted = SortedTokens(selected, weights, local)
        self._sorted.rows = sum(sizes)
        self.offsets = self._sorted.offsets
        return self._sorted.dispatch(dispatched)

    def combine(self, rows: Tensor) -> Tensor:
        """Sends this rank's part of the weighted sums back: (T, E)."""
        sums = self._sorted.combine(rows)
        return _Combine.apply(sums.to(rows.dtype), self)  # type: ignore[no-any-return, no-untyped-call]


class _Dispatch(torch.autograd.Function):
    """Tokens and weights to the ranks; their gradients are summed over these."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x: Tensor, weights: Tensor, exchange: DeepEPExchange
    ) -> tuple[Tensor, Tensor]:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        buffer = _buffer(exchange._group, x)
        by_rank, by_node, by_expert, in_rank, _ = buffer.get_dispatch_layout(exchange._selected, exchange._num_experts)
        received, selected, arrived_weights, sizes, exchange._handle, exchange._event = buffer.dispatch(
            x.contiguous(),
            topk_idx=exchange._selected,
            topk_weights=weights.contiguous(),
            num_tokens_per_rank=by_rank,
            num_tokens_per_rdma_rank=by_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=by_expert,
            async_finish=True,
        )
        exchange.counts = by_expert
        exchange._arrived = (selected, arrived_weights, sizes)
        return received, arrived_weights

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor, weights_grad: Tensor
    ) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        exchange: DeepEPExchange = ctx.exchange  # type: ignore[attr-defined]
        x_grad, weights_grad, _ = _buffer(exchange._group, grad).combine(
            grad.contiguous(), exchange._handle, topk_weights=weights_grad.float().contiguous()
        )
        return x_grad, weights_grad, None


class _Combine(torch.autograd.Function):
    """Sums back to the tokens' ranks; their gradients go where the tokens went."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, sums: Tensor, exchange: DeepEPExchange) -> Tensor:
        ctx.exchange = exchange  # type: ignore[attr-defined]
        combined: Tensor = _buffer(exchange._group, sums).combine(sums.contiguous(), exchange._handle)[0]
        return combined

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        exchange: DeepEPExchange = ctx.exchange  # type: ignore[attr-defined]
        received: Tensor = _buffer(exchange._group, grad).dispatch(grad.contiguous(), handle=exchange._handle)[0]
        return received, None
