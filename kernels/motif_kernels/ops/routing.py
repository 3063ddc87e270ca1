"""Which experts tokens go to, with what weights."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import implementation
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.reference import compute_dtype

FAMILY = "routing"


def _select(logits: Tensor, bias: Tensor | None, top_k: int, softmax: bool) -> Tensor:
    """The experts (T, k) whose score plus bias is highest, of logits (T, E)."""
    if not len(logits):
        return logits.new_empty(0, top_k, dtype=torch.int64)
    with torch.no_grad(), torch.cuda.device_of(logits):
        return implementation(FAMILY, logits.device).select_experts(logits, bias, top_k, softmax)  # type: ignore[no-any-return]


_select_operator = torch.library.custom_op("motif::select_experts", _select, mutates_args=())
select_experts = with_shortcut(_select_operator, _select)


@_select_operator.register_fake
def _(logits: Tensor, bias: Tensor | None, top_k: int, softmax: bool) -> Tensor:
    return logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)


def _weights(logits: Tensor, selected: Tensor, softmax: bool, normalise: bool, scale: float) -> tuple[Tensor, Tensor]:
    """The selected experts' weights (T, k), and all scores (T, E)."""
    if not len(logits):
        return _fake_weights(logits, selected)
    with torch.cuda.device_of(logits):
        return implementation(FAMILY, logits.device).expert_weights(logits, selected, softmax, normalise, scale)  # type: ignore[no-any-return]


def _fake_weights(logits: Tensor, selected: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits)
    return logits.new_empty(selected.shape, dtype=dtype), logits.new_empty(logits.shape, dtype=dtype)


def _weights_backward(
    grad_weights: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    selected: Tensor,
    softmax: bool,
    normalise: bool,
    scale: float,
) -> Tensor:
    """The gradient of the logits (T, E), in the scores' dtype."""
    if not len(scores):
        return scores.new_empty(scores.shape)
    with torch.cuda.device_of(scores):
        return implementation(FAMILY, scores.device).expert_weights_backward(  # type: ignore[no-any-return]
            grad_weights, grad_scores, scores, selected, softmax, normalise, scale
        )


_weights_operator = torch.library.custom_op("motif::expert_weights", _weights, mutates_args=())
_weights_operator.register_fake(_fake_weights)
_backward_operator = torch.library.custom_op("motif::expert_weights_backward", _weights_backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _weights_backward)


@_backward_operator.register_fake
def _(grad_weights: Tensor | None, grad_scores: Tensor | None, scores: Tensor, *_: Any) -> Tensor:
    return scores.new_empty(scores.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, selected, *ctx.options = inputs
    ctx.dtype = logits.dtype
    ctx.save_for_backward(output[1], selected)


def _differentiate(ctx: Any, grad_weights: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
    grad = _run_backward(grad_weights, grad_scores, *ctx.saved_tensors, *ctx.options)
    return grad.to(ctx.dtype), None, None, None, None


expert_weights = differentiable(_weights_operator, _weights, _save, _differentiate, outputs=2)
