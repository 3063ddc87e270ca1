"""DeepEP's interface on a CPU, as its documentation has it: for tests of who calls it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Event:
    """The end of a call; until it was waited for, results hold NaN."""

    results: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def current_stream_wait(self) -> None:
        for target, value in self.results:
            target.copy_(value)


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return hidden_bytes * ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, ranks: int) -> int:
        return 0


class Buffer:
    """Of `deep_ep`; a handle is, for each source, which of its tokens came, and the own number."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes

    @staticmethod
    def get_dispatch_config(ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def _everyone(self, own: Any) -> list[Any]:
        found: list[Any] = [None] * self.group.size()
        dist.all_gather_object(found, own, group=self.group)
        return found

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        ranks = self.group.size()
        local = num_experts // ranks
        rank_of = torch.where(topk_idx < 0, -1, topk_idx.div(local, rounding_mode="floor"))
        in_rank = torch.stack([(rank_of == rank).any(dim=1) for rank in range(ranks)], dim=1)
        by_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(dim=0).int(), None, by_expert, in_rank, Event([])

    def dispatch(
        self,
        x: Tensor,
        handle: Any = None,
        num_tokens_per_rank: Tensor | None = None,
        num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None,
        num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        async_finish: bool = False,
    ) -> tuple[Any, ...]:
        assert x.is_contiguous()
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            sent = self._everyone(x)
            return torch.cat([part[came] for part, came in zip(sent, handle[0], strict=True)]), *[None] * 4, Event([])
        assert topk_idx is not None
        assert topk_weights is not None
        assert num_tokens_per_expert is not None
        assert topk_weights.dtype == torch.float32
        everyone = self._everyone((x, topk_idx, topk_weights, is_token_in_rank))
        local, rank = len(num_tokens_per_expert) // self.group.size(), self.group.rank()
        places = [in_rank[:, rank].nonzero().flatten() for *_, in_rank in everyone]
        received, selected, weights = (
            torch.cat([parts[i][came] for parts, came in zip(everyone, places, strict=True)]) for i in range(3)
        )
        mine = (selected >= rank * local) & (selected < (rank + 1) * local)
        selected = torch.where(mine, selected - rank * local, -1)
        weights = weights.masked_fill(~mine, 0)
        sizes = torch.bincount(selected[mine], minlength=local).tolist()
        results = [(torch.full_like(value, torch.nan), value) for value in (received, weights)]
        event = Event(results)
        if not async_finish:
            event.current_stream_wait()
        return results[0][0], selected, results[1][0], sizes, (places, len(x)), event

    def combine(
        self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, async_finish: bool = False
    ) -> tuple[Any, ...]:
        assert x.is_contiguous()
        places, tokens = handle
        assert len(x) == sum(map(len, places))
        sent = self._everyone((x, topk_weights, places))
        rank = self.group.rank()
        sums: list[Tensor | None] = []
        for i in range(2):
            if sent[rank][i] is None:
                sums.append(None)
                continue
            total = x.new_zeros(tokens, sent[rank][i].shape[1], dtype=sent[rank][i].dtype)
            for parts in sent:
                came = parts[i].split([len(own) for own in parts[2]])[rank]
                total.index_add_(0, parts[2][rank], came)
            sums.append(total)
        return sums[0], sums[1], Event([])
