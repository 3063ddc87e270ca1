"""Softmax attention through torch's scaled_dot_product_attention, with nothing of size Sq x Sk ever
held.

torch's flash path serves plain and causal attention over one block of keys. Windows, packed
documents and a causal mask with fewer queries than keys would need a mask tensor of Sq x Sk, so
those are cut into *segments*: a run of queries with the run of keys that it can see. A segment
needs no mask, torch's own causal mask, or a small one of its own (a block of queries by a block and
a window of keys).

With Dv != D torch's CPU falls back to its matrix formula, which holds Sq x Sk: the narrower side is
padded with zeros instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.reference import attention_mask

# Queries in a segment that needs a mask of its own. Smaller blocks waste fewer masked products,
# larger ones fewer calls.
_QUERY_BLOCK = 128


class Segment(NamedTuple):
    """Queries [q_start, q_end) attend to keys [k_start, k_end).

    ``causal`` asks for torch's causal mask (as many queries as keys). Otherwise ``window`` is the
    inclusive (left, right) window, -1 for unbounded, with query ``q_start`` standing at key
    ``k_start + offset``.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    offset: int = 0

    def mask(self, like: Tensor) -> Tensor | None:
        """The additive mask (queries, keys), or None if no key of the segment is hidden from any of
        its queries.
        """
        if self.window == (-1, -1):
            return None
        queries, keys = self.q_end - self.q_start, self.k_end - self.k_start
        visible = attention_mask(queries, keys, window_size=self.window, offset=self.offset, device=like.device)
        return like.new_zeros(queries, keys).masked_fill_(~visible, -torch.inf)


def plan_segments(seqlen_q: int, seqlen_k: int, causal: bool, window_size: tuple[int, int]) -> list[Segment]:
    """Cut one document into segments, in order of their queries; queries that see nothing are in
    none of them.
    """
    if seqlen_q == 0 or seqlen_k == 0:
        return []
    offset = seqlen_k - seqlen_q  # query i stands at key i + offset
    left, right = window_size
    if causal:
        right = 0
    # Bounds that hide nothing are dropped: the first query sees the last key, the last query sees
    # the first key.
    if right >= seqlen_q - 1:
        right = -1
    if left >= seqlen_k - 1:
        left = -1
    if left < 0 and right < 0:
        return [Segment(0, seqlen_q, 0, seqlen_k)]
    if left < 0 and right == 0 and offset <= 0:
        # With more queries than keys, the first ones see nothing.
        return [Segment(-offset, seqlen_q, 0, seqlen_k, causal=True)]
    segments = []
    for block in range(0, seqlen_q, _QUERY_BLOCK):
        start, end = block, min(block + _QUERY_BLOCK, seqlen_q)
        if right >= 0:
            start = max(start, -offset - right)  # the first query that sees the first key
        if left >= 0:
            end = min(end, seqlen_k - offset + left)  # one past the last query that sees the last key
        if start >= end:
            continue
        k_start = max(0, start + offset - left) if left >= 0 else 0
        k_end = min(seqlen_k, end + offset + right) if right >= 0 else seqlen_k
        hides_left = left >= 0 and k_start < end - 1 + offset - left
        hides_right = right >= 0 and start + offset + right < k_end - 1
        window = (left if hides_left else -1, right if hides_right else -1)
        segments.append(Segment(start, end, k_start, k_end, window=window, offset=start + offset - k_start))
    return segments


def _plan(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    window: tuple[int, int],
) -> list[Segment]:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return plan_segments(q.shape[1], k.shape[1], causal, window)
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    segments = []
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        for s in plan_segments(q1 - q0, k1 - k0, causal, window):
            segments.append(
                s._replace(q_start=s.q_start + q0, q_end=s.q_end + q0, k_start=s.k_start + k0, k_end=s.k_end + k0)
            )
    return segments


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the narrower of (q, k) and v with zeros, which add nothing to a product and columns of 0
    to the output.
    """
    width = max(q.shape[-1], v.shape[-1])

    def widened(t: Tensor) -> Tensor:
        return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))  # a pad of 0 would copy

    return widened(q), widened(k), widened(v)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """One call of torch's attention: q (B, Sq, H, D), k (B, Sk, Hk, D), v (B, Sk, Hv, Dv) ->
    (B, Sq, H, Dv).
    """
    width = v.shape[-1]
    q, k, v = _equal_widths(q, k, v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)[..., :width]


@torch.library.custom_op("motif::segmented_attention", mutates_args=())
def _segmented_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    # q (B, Sq, H, D), k (B, Sk, H, D), v (B, Sk, H, Dv): heads already repeated; B is 1 with
    # cu_seqlens.
    width = v.shape[-1]
    out = q.new_zeros(*q.shape[:-1], width)
    logsumexp = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=_logsumexp_dtype(q))
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        q, k, v = _equal_widths(q, k, v)
    for s in _plan(q, k, cu_seqlens_q, cu_seqlens_k, causal, (left, right)):
        queries, keys = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
        mask = s.mask(q)
        if on_cpu:
            o, logsumexp[:, :, queries] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[:, queries].transpose(1, 2),
                k[:, keys].transpose(1, 2),
                v[:, keys].transpose(1, 2),
                0.0,
                s.causal,
                attn_mask=mask,
                scale=scale,
            )
            out[:, queries] = o.transpose(1, 2)[..., :width]
        else:
            out[:, queries] = _attend(q[:, queries], k[:, keys], v[:, keys], scale=scale, causal=s.causal, mask=mask)
    return out, logsumexp


def _logsumexp_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@_segmented_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    logsumexp = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=_logsumexp_dtype(q))
    return q.new_empty(*q.shape[:-1], v.shape[-1]), logsumexp


@torch.library.custom_op("motif::segmented_attention_backward", mutates_args=())
def _segmented_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    on_cpu = q.device.type == "cpu"
    widths = q.shape[-1], v.shape[-1]
    if on_cpu:
        q, k, v = _equal_widths(q, k, v)
        pad = q.shape[-1] - widths[1]
        out, grad = F.pad(out, (0, pad)), F.pad(grad, (0, pad))
    for s in _plan(q, k, cu_seqlens_q, cu_seqlens_k, causal, (left, right)):
        queries, keys = slice(s.q_start, s.q_end), slice(s.k_start, s.k_end)
        mask = s.mask(q)
        if on_cpu:
            dq_, dk_, dv_ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, queries].transpose(1, 2),
                q[:, queries].transpose(1, 2),
                k[:, keys].transpose(1, 2),
                v[:, keys].transpose(1, 2),
                out[:, queries].transpose(1, 2),
                logsumexp[:, :, queries],
                0.0,
                s.causal,
                attn_mask=mask,
                scale=scale,
            )
            dq_, dk_, dv_ = dq_.transpose(1, 2), dk_.transpose(1, 2), dv_.transpose(1, 2)
        else:
            # Other devices keep no log-sum-exp here: the segment is computed again and
            # differentiated by autograd.
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q[:, queries], k[:, keys], v[:, keys])]
                o = _attend(*leaves, scale=scale, causal=s.causal, mask=mask)
                dq_, dk_, dv_ = torch.autograd.grad(o, leaves, grad[:, queries])
        dq[:, queries] += dq_[..., : widths[0]]
        dk[:, keys] += dk_[..., : widths[0]]
        dv[:, keys] += dv_[..., : widths[1]]
    return dq, dk, dv


@_segmented_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    scale: float,
    causal: bool,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.mask = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _segmented_attention_backward(grad, *ctx.saved_tensors, *ctx.mask)
    return *grads, None, None, None, None, None, None


_segmented_attention.register_autograd(_differentiate, setup_context=_save)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float) -> Tensor:
    """Attention under a mask (B, 1, Sq, Sk), True where a query sees a key: for few queries, as it
    is held whole.

    Shapes are :func:`attention`'s.
    """
    if k.shape[2] != v.shape[2]:
        k, v = _repeat_heads(k, q.shape[2]), _repeat_heads(v, q.shape[2])
    return _attend(q, k, v, scale=scale, mask=visible)


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    return t if t.shape[2] == heads else t.repeat_interleave(heads // t.shape[2], dim=2)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool,
    window_size: tuple[int, int],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Softmax attention without an attention map in memory.

    Args:
        q: (B, Sq, H, D); B is 1 with cu_seqlens.
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: (B, Sk, Hv, Dv), H a multiple of Hv.
        scale: multiplies the logits.
        causal: mask later keys, aligned to the bottom right.
        window_size: inclusive (left, right), -1 for unbounded.
        cu_seqlens_q: int32 (documents + 1,) bounds of packed documents in Sq.
        cu_seqlens_k: the same in Sk.

    Returns:
        Tensor (B, Sq, H, Dv) of q's dtype; a row that sees nothing is 0.
    """
    heads = q.shape[2]
    if k.shape[2] != v.shape[2]:
        k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    if cu_seqlens_q is None:
        segments = plan_segments(q.shape[1], k.shape[1], causal, window_size)
        if segments in ([Segment(0, q.shape[1], 0, k.shape[1])], [Segment(0, q.shape[1], 0, k.shape[1], causal=True)]):
            return _attend(q, k, v, scale=scale, causal=segments[0].causal)
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    out, _ = _segmented_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, *window_size)
    return out
