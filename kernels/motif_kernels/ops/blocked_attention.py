"""Softmax attention by blocked matrix products, on a CPU, as one torch operator."""

from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.cpu import attention as impl
from motif_kernels.impl.sdpa.segments import Segment, plan_blocks, plan_packed
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.types import AttentionOptions, Sequences


def _plan(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, window_size: tuple[int, int]
) -> list[Segment]:
    """The blocks of all sequences, in tokens of the whole batch."""

    def plan(seqlen_q: int, seqlen_k: int) -> list[Segment]:
        return plan_blocks(seqlen_q, seqlen_k, window_size, impl.block_queries(q.shape[2] // k.shape[2], seqlen_k))

    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        return plan_packed(cu_seqlens_q, cu_seqlens_k, plan)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    blocks = plan(seqlen_q, seqlen_k)
    return [block.moved(row * seqlen_q, row * seqlen_k) for row in range(len(q)) for block in blocks]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> Tensor:
    """Q (B, Sq, H, D), k (B, Sk, N, D), v (B, Sk, N, Dv), H a multiple of N; B is 1 with
    cu_seqlens.
    """
    return impl.forward(q, k, v, _plan(q, k, cu_seqlens_q, cu_seqlens_k, (left, right)), scale)


_operator = torch.library.custom_op("motif::blocked_attention", _forward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return impl.backward(grad, q, k, v, _plan(q, k, cu_seqlens_q, cu_seqlens_k, (left, right)), scale)


_backward_operator = torch.library.custom_op("motif::blocked_attention_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_backward_operator.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.left, ctx.right = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _run_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.left, ctx.right)
    return *grads, None, None, None, None, None


blocked_attention = differentiable(_operator, _forward, _save, _differentiate)


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    """Softmax attention without an attention map in memory: arguments and result are those of
    :func:`motif_kernels.ops.sdpa.attention`.
    """
    if sequences.is_packed:
        q, k, v = q[None], k[None], v[None]
    heads = max(k.shape[2], v.shape[2])
    if k.shape[2] != v.shape[2]:  # each of the larger number attends for itself, or every query head
        heads = heads if heads % min(k.shape[2], v.shape[2]) == 0 else q.shape[2]
        k, v = (t.repeat_interleave(heads // t.shape[2], dim=2) for t in (k, v))
    out = blocked_attention(
        q, k, v, sequences.cu_seqlens_q, sequences.cu_seqlens_k, options.softmax_scale, *options.window_size
    )
    return out[0] if sequences.is_packed else out
