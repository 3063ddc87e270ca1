"""Softmax attention on the same backends and masks, for a baseline that differs in nothing else."""

from __future__ import annotations

from torch import Tensor

from . import reference, sdpa
from .checks import check_cu_seqlens

BACKENDS = ("auto", "reference", "sdpa")


def softmax_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in FlashAttention's conventions.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: (B, Sk, Hv, Dv), H a multiple of Hv.
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: hide later keys, aligned to the bottom right.
        window_size: inclusive (left, right), -1 for unbounded.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        Tensor (B, Sq, H, Dv) of q's dtype.

    Raises:
        ValueError: heads that do not divide, or an unknown backend.
    """
    _check_heads(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if _choose_backend(backend) == "sdpa":
        return sdpa.attention(q, k, v, scale=scale, causal=causal, window_size=window_size)
    visible = reference.visibility_mask(q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device)
    return reference.attention(q, k, v, visible=visible, softmax_scale=scale)[0].to(q.dtype)


def softmax_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    backend: str = "auto",
) -> Tensor:
    """:func:`softmax_attn_func` over packed documents.

    Args:
        q: (total_q, H, D).
        k: (total_k, Hk, D).
        v: (total_k, Hv, Dv).
        cu_seqlens_q: (documents + 1,) int32 bounds in total_q.
        cu_seqlens_k: (documents + 1,) int32 bounds in total_k.
        max_seqlen_q: the longest document's queries (or more).
        max_seqlen_k: the longest document's keys (or more).
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: bottom-right aligned within each document.
        window_size: inclusive (left, right) within each document.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        Tensor (total_q, H, Dv) of q's dtype.

    Raises:
        TypeError: cu_seqlens is not int32.
        ValueError: heads or cu_seqlens that do not fit, or an unknown backend.
    """
    _check_heads(q, k, v)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, q.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k, q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if _choose_backend(backend) == "sdpa":
        return sdpa.attention(
            q[None],
            k[None],
            v[None],
            scale=scale,
            causal=causal,
            window_size=window_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )[0]
    visible = reference.packed_visibility_mask(
        cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal=causal, window_size=window_size
    )
    return reference.attention(q[None], k[None], v[None], visible=visible, softmax_scale=scale)[0][0].to(q.dtype)


def _choose_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}, which serve softmax attention"
        )
    return "sdpa" if backend == "auto" else backend


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("k", k), ("v", v)):
        if t.shape[-2] < 1 or q.shape[-2] % t.shape[-2]:
            raise ValueError(
                f"q has {q.shape[-2]} heads and {name} has {t.shape[-2]}; q's must be a multiple of {name}'s"
            )
