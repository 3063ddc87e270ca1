"""Softmax attention through torch's scaled_dot_product_attention, with nothing of size Sq x Sk ever
held.

torch's flash path serves plain and causal attention over one block of keys. Windows, packed
documents and a causal mask with fewer queries than keys would need a mask tensor of Sq x Sk, so
those are cut into *segments*: a run of queries with the run of keys that it can see. A segment
needs no mask, torch's own causal mask, or a small one of its own (a block of queries by a block and
a window of keys). All segments of a call are one torch operator.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from motif_kernels.impl.sdpa import attention as impl
from motif_kernels.impl.sdpa.segments import Segment, plan_packed, plan_segments
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.types import AttentionOptions, Sequences


def _plan(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, window_size: tuple[int, int]
) -> list[Segment]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return plan_segments(q.shape[1], k.shape[1], window_size)
    return plan_packed(cu_seqlens_q, cu_seqlens_k, partial(plan_segments, window_size=window_size))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """Q (B, Sq, H, D), k (B, Sk, H, D), v (B, Sk, H, Dv): heads already repeated; B is 1 with
    cu_seqlens.
    """
    return impl.forward(q, k, v, _plan(q, k, cu_seqlens_q, cu_seqlens_k, (left, right)), scale)


_operator = torch.library.custom_op("motif::segmented_attention", _forward, mutates_args=())


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    logsumexp = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=impl.logsumexp_dtype(q))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), logsumexp


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    segments = _plan(q, k, cu_seqlens_q, cu_seqlens_k, (left, right))
    return impl.backward(grad, q, k, v, out, logsumexp, segments, scale)


_backward_operator = torch.library.custom_op("motif::segmented_attention_backward", _backward, mutates_args=())
_run_backward = with_shortcut(_backward_operator, _backward)


@_backward_operator.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    grads = _run_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return *grads, None, None, *(None for _ in ctx.numbers)


segmented_attention = differentiable(_operator, _forward, _save, _differentiate)


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2)


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    """Softmax attention without an attention map in memory.

    Args:
        q: (B, Sq, H, D), or packed (total_q, H, D).
        k: (B, Sk, Hk, D), or packed, H a multiple of Hk.
        v: (B, Sk, Hv, Dv), or packed, H a multiple of Hv.
        sequences: rows of the batch, or packed documents.
        options: scale and window.

    Returns:
        Tensor (B, Sq, H, Dv), or packed, of q's dtype; a fully masked row is 0.
    """
    if sequences.is_packed:
        q, k, v = q[None], k[None], v[None]
    heads, scale, window = q.shape[2], options.softmax_scale, options.window_size
    if k.shape[2] != v.shape[2]:
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    if not sequences.is_packed:
        segments = plan_segments(q.shape[1], k.shape[1], window)
        if segments in ([Segment(0, q.shape[1], 0, k.shape[1])], [Segment(0, q.shape[1], 0, k.shape[1], causal=True)]):
            return impl.attend(q, k, v, scale=scale, causal=segments[0].causal)
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    out, _ = segmented_attention(q, k, v, sequences.cu_seqlens_q, sequences.cu_seqlens_k, scale, *window)
    return out[0] if sequences.is_packed else out
