"""Routing in plain PyTorch: the specification of :mod:`motif_kernels.routing`.

A token has k slots, one for each of its experts. Rows are the (token, slot) pairs sorted by expert.
"""

import torch
from torch import Tensor

from motif_kernels.reference import compute_dtype

# What keeps a sum of scores that are all 0 from dividing by it.
TINY = 1e-20


def expert_scores(logits: Tensor, softmax: bool) -> Tensor:
    """The softmax or sigmoid of logits (T, E), in the compute dtype."""
    logits = logits.to(compute_dtype(logits))
    return logits.softmax(dim=-1) if softmax else logits.sigmoid()


def select_experts(logits: Tensor, bias: Tensor | None, top_k: int, softmax: bool) -> Tensor:
    """The experts (T, k) of highest score plus bias, highest first; of equals the first, and NaN
    before all numbers.
    """
    preference = expert_scores(logits.detach(), softmax)
    if bias is not None:
        preference = preference + bias.to(preference.dtype)
    return preference.sort(dim=-1, descending=True, stable=True).indices[:, :top_k].contiguous()


def expert_weights(
    logits: Tensor, selected: Tensor, softmax: bool, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The selected experts' scores (T, k), divided by their sum if ``normalise``, times scale; and
    all scores (T, E).
    """
    scores = expert_scores(logits, softmax)
    weights = scores.gather(1, selected)
    if normalise:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
    return weights * scale, scores


def sort_by_expert(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each slot's row is, (T, k), and where each expert's rows end, (num_experts,) int32.

    Slots of no expert, whose number is none of the experts', come last.
    """
    of_one = (selected >= 0) & (selected < num_experts)
    experts, order = selected.where(of_one, num_experts).flatten().sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    index = torch.arange(num_experts, device=experts.device)
    return places.view(selected.shape), torch.searchsorted(experts, index, right=True, out_int32=True)


def dispatch(x: Tensor, places: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Each token of x (T, N) in the rows of its slots, (rows, N); 0 in rows of no expert."""
    tokens, slots = places.shape
    index = torch.arange(tokens * slots, device=x.device)
    order = torch.empty_like(index).scatter_(0, places.flatten(), index)[:rows]
    out = x.index_select(0, order // slots)
    return out.masked_fill((index[:rows] >= offsets[-1])[:, None], 0)


def combine(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor) -> Tensor:
    """The sums (T, N) of each token's rows, times its weights if given; rows of no expert, and
    places past the last row, add nothing.

    In the dtype that rows and weights promote to.
    """
    if not len(rows):
        picked = rows.sum(dim=0).expand(*places.shape, -1)  # 0, and with a gradient
    else:
        picked = rows[places.clamp(max=len(rows) - 1)].masked_fill((places >= offsets[-1])[..., None], 0)
    if weights is None:
        return picked.to(compute_dtype(rows)).sum(dim=1).to(rows.dtype)
    return (picked * weights[..., None]).sum(dim=1)
