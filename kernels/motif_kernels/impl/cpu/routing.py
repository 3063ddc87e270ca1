"""Which experts tokens go to, with what weights, on the CPU."""

import torch
from torch import Tensor

from motif_kernels.impl.cpu.row_blocks import row_blocks
from motif_kernels.reference_routing import TINY, expert_scores
from motif_kernels.reference_routing import expert_weights as expert_weights  # whose passes are as few as can be


def select_experts(logits: Tensor, bias: Tensor | None, top_k: int, softmax: bool) -> Tensor:
    """As :func:`motif_kernels.reference_routing.select_experts`; only a block's preferences are in
    memory.
    """
    selected = logits.new_empty(len(logits), top_k, dtype=torch.int64)
    for block in row_blocks(*logits.shape):
        preference = expert_scores(logits[block], softmax)
        if bias is not None:
            preference = preference.add_(bias)
        selected[block] = _highest(preference, top_k)
    return selected


def _highest(preference: Tensor, top_k: int) -> Tensor:
    """Of equals topk takes any. Rows that have some, or NaN, are sorted: five times the work."""
    values, index = preference.topk(min(top_k + 1, preference.shape[1]))
    unclear = (values[:, :-1] > values[:, 1:]).all(dim=1).logical_not_()
    index = index[:, :top_k]
    if unclear.any():
        index[unclear] = preference[unclear].sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return index


def expert_weights_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    selected: Tensor,
    softmax: bool,
    normalise: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits, (T, E)."""
    grad = torch.zeros_like(scores) if grad_scores is None else grad_scores.clone()
    if grad_weights is not None:
        grad.scatter_add_(1, selected, _grad_of_selected(grad_weights, scores.gather(1, selected), normalise, scale))
    for block in row_blocks(*scores.shape):
        part, score = grad[block], scores[block]
        if softmax:
            part.sub_((part * score).sum(dim=1, keepdim=True)).mul_(score)
        else:
            part.mul_((1 - score).mul_(score))
    return grad


def _grad_of_selected(grad: Tensor, selected_scores: Tensor, normalise: bool, scale: float) -> Tensor:
    if not normalise:
        return grad * scale
    total = selected_scores.sum(dim=1, keepdim=True) + TINY
    return (grad - (grad * (selected_scores / total)).sum(dim=1, keepdim=True)) * (scale / total)
