"""Softmax attention through flash-attn 4 or 2, whichever is installed.

Differential attention takes two calls of :func:`attention`, one for all signal heads and one for
the noise heads, which are never repeated, and :func:`motif_kernels.diff_combine`. What the
libraries lack is made up for here:

- **Width of values.** 2 wants values as wide as keys, 4 allows a few pairs of widths. Values are
  cut into pieces, one call each, which repeats Q K^T, or padded with zeros:
  :func:`~motif_kernels.impl.flash.libraries.plan_value_width` takes what costs the library least.
- **Key and value heads** must be equally many. The fewer are repeated up to the least common
  multiple, no further: a single head as a view, more as a copy.
- **Windows.** 2 takes a side of at least the key length for unbounded and an unbounded side for the
  key length, both right only while there are no more queries than keys. Where there are more it is
  called with packed sequences and a key length that makes it right.
- **Tokens after the last document** the libraries leave as they find them, gradients too: cleared.
- **Empty tensors** are answered here: they would launch nothing, or fail.

A fully masked row is 0 in each of them and passes no gradient: 2 stores a log-sum-exp of +inf for
such a row, 4 -inf, replaced by 0 in the backward pass, so that its probabilities are exp(-inf) = 0
there.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.impl.flash import libraries
from motif_kernels.impl.flash.libraries import Request, ValuePlan
from motif_kernels.reference import clear_rest
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences


def _plan(device: torch.device, request: Request) -> tuple[int, ValuePlan] | str:
    from motif_kernels import machine

    found = machine.flash_plan(device, *request)
    return found if isinstance(found, str) else (found[0], ValuePlan(*found[1:]))


def unsupported_reason(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> str | None:
    """Why no installed flash-attn can serve a call, in words that follow "cannot serve", or None.

    Windows and causal masks are served by every generation.
    """
    if inputs.q1.dtype not in (torch.float16, torch.bfloat16):
        return f"{inputs.q1.dtype}: flash-attn takes float16 and bfloat16"
    # Heads do not decide it: where they matter, padding to equal widths helps.
    widths = inputs.q1.shape[-1], inputs.v.shape[-1]
    request = Request(*widths, options.softcap, options.deterministic, True, inputs.needs_grad)
    found = _plan(inputs.q1.device, request)
    return found if isinstance(found, str) else None


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    """:func:`pieces` as one tensor: a copy, if there are several."""
    outputs = pieces(q, k, v, sequences, options)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def pieces(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> list[Tensor]:
    """Softmax attention by flash-attn.

    Args:
        q: (B, Sq, H, D), or packed (total_q, H, D), in float16 or bfloat16, on a GPU.
        k: (B, Sk, Hk, D), or packed, H a multiple of Hk.
        v: (B, Sk, Hv, Dv), or packed, H a multiple of Hv.
        sequences: rows of the batch, or packed documents.
        options: scale, window, softcap and whether the backward pass is deterministic.

    Returns:
        Tensors (B, Sq, H, width), or packed, of q's dtype, whose widths add up to Dv: as many as
        calls were needed. A fully masked row is 0.

    Raises:
        ValueError: no installed flash-attn can serve the arguments.
    """
    if not (q.numel() and k.numel() and v.numel()):
        # The empty sums keep the inputs in the graph, with gradients of 0.
        zero = sum(t.flatten()[:0].sum() for t in (q, k, v))
        return [q.new_zeros(*q.shape[:-1], v.shape[-1]) + zero]
    heads = math.lcm(k.shape[-2], v.shape[-2])
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    grouped = heads != q.shape[-2]
    widths = q.shape[-1], v.shape[-1]
    found = _plan(q.device, Request(*widths, options.softcap, options.deterministic, grouped, backward))
    if isinstance(found, str):
        raise ValueError(f"backend 'flash' cannot serve {found}")
    version, plan = found
    bounds_q, bounds_k = sequences.cu_seqlens_q, sequences.cu_seqlens_k
    if backward and bounds_q is not None and bounds_k is not None:
        q, k, v = (_ClearGradient.apply(t, bounds) for t, bounds in ((q, bounds_q), (k, bounds_k), (v, bounds_k)))
    k, v = _repeat_heads(k, heads), _repeat_heads(v, heads)
    q, k = _pad(q, plan.head_dim), _pad(k, plan.head_dim)
    # split, not slices: its backward pass joins the pieces' gradients in one step.
    outputs = [
        _call(version, q, k, _pad(piece, plan.v_head_dim), sequences, options)[..., : piece.shape[-1]]
        for piece in v.split(plan.piece, dim=-1)
    ]
    return outputs if bounds_q is None else [clear_rest(out, bounds_q) for out in outputs]


class _ClearGradient(torch.autograd.Function):
    """Packed tokens as they are; the gradient is cleared after the last document."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cu_seqlens: Tensor) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return clear_rest(grad, *ctx.saved_tensors), None


def _pad(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


def _repeat_heads(t: Tensor, heads: int) -> Tensor:
    """Each head (..., H, D) repeated in place, to ``heads``; a view if there is one head."""
    if t.shape[-2] == heads:
        return t
    repeats = heads // t.shape[-2]
    return t.unsqueeze(-2).expand(*t.shape[:-1], repeats, t.shape[-1]).flatten(-3, -2)


def _even_bounds(t: Tensor) -> Tensor:
    """Bounds of a batch (B, S, heads, width) seen as packed sequences."""
    batch, seqlen = t.shape[:2]
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=t.device)


def _call(version: int, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, options: AttentionOptions) -> Tensor:
    left, right = (max(side, -1) for side in options.window_size)
    causal = right == 0
    shape = q.shape
    if version == 2 and not causal and (left, right) != (-1, -1):
        if sequences.is_packed:
            longest = max(sequences.max_seqlen_q, sequences.max_seqlen_k)
            sequences = sequences._replace(max_seqlen_k=longest)
        elif q.shape[1] > k.shape[1]:
            sequences = Sequences(q.shape[1], q.shape[1], _even_bounds(q), _even_bounds(k))
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    unbounded = None if version == 4 else -1
    library = libraries.loaded[version]
    bounds = sequences._asdict() if sequences.is_packed else {}
    result = (library.packed if sequences.is_packed else library.dense)(
        q,
        k,
        v,
        **bounds,
        softmax_scale=options.softmax_scale,
        causal=causal,
        window_size=tuple(unbounded if side < 0 else side for side in (left, -1 if causal else right)),
        softcap=options.softcap,
        deterministic=options.deterministic,
    )
    out = result[0] if isinstance(result, tuple) else result  # some generations give the log-sum-exp too
    return out.view(*shape[:-1], out.shape[-1])
