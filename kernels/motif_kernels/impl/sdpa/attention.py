"""Calls of torch's attention on plain tensors: one, or one for each segment, forward and backward.

With Dv != D torch's CPU falls back to its matrix formula, which holds Sq x Sk: the narrower side is
padded with zeros instead.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.impl.sdpa.segments import Segment


def _equal_widths(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pads the narrower of (q, k) and v with zeros, which add nothing."""
    width = max(q.shape[-1], v.shape[-1])

    def widened(t: Tensor) -> Tensor:
        return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))  # a pad of 0 would copy

    return widened(q), widened(k), widened(v)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One call of torch's attention.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D).
        v: (B, Sk, Hk, Dv).
        scale: multiplies the logits.
        causal: torch's causal mask, aligned to the top left.
        mask: additive or bool, (Sq, Sk) or what broadcasts to (B, H, Sq, Sk).
        dropout: the share of probabilities that are left out.

    Returns:
        Tensor (B, Sq, H, Dv).
    """
    width = v.shape[-1]
    q, k, v = _equal_widths(q, k, v)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scale,
        enable_gqa=k.shape[2] != q.shape[2],
    )
    return out.transpose(1, 2)[..., :width]


def logsumexp_dtype(q: Tensor) -> torch.dtype:
    """Of what the forward pass over segments leaves for the backward."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> tuple[Tensor, Tensor]:
    """The output (B, Sq, H, Dv) of q (B, Sq, H, D), k and v with as many heads, and the log-sum-exp
    (B, H, Sq), which only a CPU fills.
    """
    width = v.shape[-1]
    out = q.new_zeros(*q.shape[:-1], width)
    logsumexp = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=logsumexp_dtype(q))
    on_cpu = q.device.type == "cpu"
    if on_cpu:
        q, k, v = _equal_widths(q, k, v)
    for s in segments:
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
            out[:, queries] = attend(q[:, queries], k[:, keys], v[:, keys], scale=scale, causal=s.causal, mask=mask)
    return out, logsumexp


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    segments: Sequence[Segment],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    on_cpu = q.device.type == "cpu"
    widths = q.shape[-1], v.shape[-1]
    if on_cpu:
        q, k, v = _equal_widths(q, k, v)
        pad = q.shape[-1] - widths[1]
        out, grad = F.pad(out, (0, pad)), F.pad(grad, (0, pad))
    for s in segments:
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
            # Other devices keep no log-sum-exp here: the segment is recomputed and differentiated
            # by autograd.
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (q[:, queries], k[:, keys], v[:, keys])]
                o = attend(*leaves, scale=scale, causal=s.causal, mask=mask)
                dq_, dk_, dv_ = torch.autograd.grad(o, leaves, grad[:, queries])
        dq[:, queries] += dq_[..., : widths[0]]
        dk[:, keys] += dk_[..., : widths[0]]
        dv[:, keys] += dv_[..., : widths[1]]
    return dq, dk, dv
