"""Softmax attention on the same backends and masks, for a baseline that differs in nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from motif_kernels import reference
from motif_kernels.checks import check_cu_seqlens, may_read
from motif_kernels.impl import sdpa
from motif_kernels.ops.decoding import check_room

BACKENDS = ("auto", "reference", "sdpa")


def softmax_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_max_logits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in FlashAttention's conventions.

    Args:
        q: (B, Sq, H, D).
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: (B, Sk, Hv, Dv), H a multiple of Hv.
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: hide later keys, aligned to the bottom right.
        window_size: inclusive (left, right), -1 for unbounded.
        return_max_logits: also return each head's largest scaled, visible logit over the batch;
            "reference" alone can.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        Tensor (B, Sq, H, Dv) of q's dtype; with return_max_logits also (H,) float32, without
        gradient.

    Raises:
        ValueError: heads that do not divide, or a backend that is unknown or cannot serve.
    """
    _check_heads(q, k, v)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if _choose_backend(backend, return_max_logits) == "sdpa":
        return sdpa.attention(q, k, v, scale=scale, causal=causal, window_size=window_size)
    visible = reference.attention_mask(q.shape[1], k.shape[1], causal=causal, window_size=window_size, device=q.device)
    out, largest = reference.attention(q, k, v, mask=visible, softmax_scale=scale)
    return (out.to(q.dtype), largest.float()) if return_max_logits else out.to(q.dtype)


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
    return_max_logits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
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
        return_max_logits: as there.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        Tensor (total_q, H, Dv) of q's dtype; with return_max_logits also (H,) float32, without
        gradient.

    Raises:
        TypeError: cu_seqlens is not int32.
        ValueError: heads or cu_seqlens that do not fit, or an unknown backend.
    """
    _check_heads(q, k, v)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q, q.device)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k, q.device)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if _choose_backend(backend, return_max_logits) == "sdpa":
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
    visible = reference.packed_attention_mask(
        cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal=causal, window_size=window_size
    )
    out, largest = reference.attention(q[None], k[None], v[None], mask=visible, softmax_scale=scale)
    return (out[0].to(q.dtype), largest.float()) if return_max_logits else out[0].to(q.dtype)


def softmax_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    backend: str = "auto",
) -> Tensor:
    """Attention of new queries to a cache that already holds their own keys and values.

    On a CPU each row's own places are read. Elsewhere, where lengths may not be looked at, all
    places are read under a mask, and those that hold nothing must be finite.

    Args:
        q: (B, Sq, H, D).
        k_cache: (B, capacity, Hk, D); or, with ``block_table``, (blocks, block size, Hk, D).
        v_cache: like k_cache, with Hv heads of width Dv.
        cache_seqlens: (B,) int32, the tokens that each row holds.
        cache_leftpad: (B,) int32, tokens at the start of each row that are seen by nobody.
        block_table: (B, blocks of a row) int32: which blocks of a paged cache hold a row's tokens,
            in order.
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: the last query stands at the last key.
        window_size: inclusive (left, right), -1 for unbounded.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        Tensor (B, Sq, H, Dv) of q's dtype.

    Raises:
        ValueError: heads that do not divide, lengths past the cache, or an unknown backend.
    """
    _check_heads(q, k_cache, v_cache)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if block_table is not None:
        k_cache, v_cache = (t[block_table.long()].flatten(1, 2) for t in (k_cache, v_cache))
    capacity = k_cache.shape[1]
    if may_read(cache_seqlens):
        check_room(cache_seqlens, 0, capacity)
        ends = cache_seqlens.tolist()
        begins = [0] * len(ends) if cache_leftpad is None else cache_leftpad.tolist()
        equal = len(set(ends)) == len(set(begins)) == 1
        groups = [slice(0, len(ends))] if equal else [slice(b, b + 1) for b in range(len(ends))]
        parts = []
        for rows in groups:
            held = slice(begins[rows.start], ends[rows.start])
            part = softmax_attn_func(
                q[rows],
                k_cache[rows, held],
                v_cache[rows, held],
                softmax_scale=scale,
                causal=causal,
                window_size=window_size,
                backend=backend,
            )
            assert isinstance(part, Tensor)
            parts.append(part)
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    _choose_backend(backend)
    position = torch.arange(capacity, device=q.device)
    query = cache_seqlens[:, None] + torch.arange(-q.shape[1], 0, device=q.device)  # (B, Sq): where queries stand
    ahead = position - query[..., None]
    visible = (position < cache_seqlens[:, None, None]).expand_as(ahead)
    left, right = window_size
    if causal:
        right = 0
    if cache_leftpad is not None:
        visible = visible & (position >= cache_leftpad[:, None, None])
    if left >= 0:
        visible = visible & (ahead >= -left)
    if right >= 0:
        visible = visible & (ahead <= right)
    out = sdpa.masked_attention(q, k_cache, v_cache, visible[:, None], scale=scale)
    return out.masked_fill(~visible.any(-1)[..., None, None], 0.0)  # a row that sees nothing


def _choose_backend(backend: str, return_max_logits: bool = False) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}, which serve softmax attention"
        )
    if backend == "sdpa" and return_max_logits:
        raise ValueError(
            "backend 'sdpa' cannot serve return_max_logits=True: torch's scaled_dot_product_attention does not give "
            "its logits; use 'reference' or 'auto'"
        )
    if backend == "auto":
        return "reference" if return_max_logits else "sdpa"
    return backend


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("k", k), ("v", v)):
        if t.shape[-2] < 1 or q.shape[-2] % t.shape[-2]:
            raise ValueError(
                f"q has {q.shape[-2]} heads and {name} has {t.shape[-2]}; q's must be a multiple of {name}'s"
            )
