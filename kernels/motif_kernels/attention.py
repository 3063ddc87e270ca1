"""The public attention functions: they check their arguments, choose a backend and call it."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import reference, sdpa
from .checks import check_attention, check_cu_seqlens, check_epilogue
from .combine import diff_combine

Backend = Literal["auto", "reference", "sdpa"]
BACKENDS = ("auto", "reference", "sdpa")


def _refusal_by_sdpa(softcap: float, return_max_logits: bool) -> str | None:
    """Why the sdpa backend cannot serve these arguments, or None."""
    if softcap > 0:
        return f"softcap={softcap}: torch's scaled_dot_product_attention has no soft cap"
    if return_max_logits:
        return "return_max_logits=True: torch's scaled_dot_product_attention does not give its logits"
    return None


def choose_backend(backend: str, *, softcap: float = 0.0, return_max_logits: bool = False) -> str:
    """Resolve ``"auto"`` and refuse a backend that cannot serve the arguments.

    Raises:
        ValueError: an unknown backend, or one asked for by name that cannot serve the arguments (the message says why).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    refusal = _refusal_by_sdpa(softcap, return_max_logits)
    if backend == "auto":
        return "reference" if refusal else "sdpa"
    if backend == "sdpa" and refusal:
        raise ValueError(f"backend 'sdpa' cannot serve {refusal}; use backend 'reference' or 'auto'")
    return backend


def diff_attn_func(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor | float,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
    deterministic: bool = True,
    return_max_logits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Differential attention: ``softmax(q1 k1^T) v - lam * softmax(q2 k2^T) v``, then sub-norm, gate or neither.

    Signal head h is paired with noise head ``h // (Hs / Hn)``; the noise product is computed once a noise head. Key
    and value heads may be fewer (grouped queries). Sources: Differential Transformer, arXiv 2410.05258 (Hs = Hn);
    Grouped Differential Attention, arXiv 2510.06949 (Hs = g Hn). Conventions are FlashAttention's.

    Args:
        q1: (B, Sq, Hs, D) signal queries.
        k1: (B, Sk, Hk1, D) signal keys, Hs a multiple of Hk1.
        q2: (B, Sq, Hn, D) noise queries, Hs a multiple of Hn.
        k2: (B, Sk, Hk2, D) noise keys, Hn a multiple of Hk2; may be k1 itself.
        v: (B, Sk, Hv, Dv) values, Hn a multiple of Hv.
        lam: a float, or a differentiable tensor of shape (), (Hs,) or (B, Sq, Hs).
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: hide later keys; the last query is aligned with the last key (bottom right).
        window_size: inclusive (left, right) window around each query's position, -1 for unbounded.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        norm_weight: (Dv,) weight of the sub-norm (RMSNorm of each head's output), or None for no sub-norm.
        norm_eps: the sub-norm's epsilon.
        out_scale: always multiplies the output.
        gate: (B, Sq, Hs, Dv): multiply the output by ``sigmoid(gate)``. Not together with norm_weight.
        deterministic: ask for a backward pass whose result does not depend on scheduling; every present backend is.
        return_max_logits: also return each head's largest scaled, visible logit over the batch (float32, no gradient).
        backend: ``"reference"`` (plain mathematics), ``"sdpa"`` (torch's attention, no map in memory) or ``"auto"``.

    Returns:
        The output (B, Sq, Hs, Dv) in q1's dtype; with return_max_logits ``(out, max_signal (Hs,), max_noise
        (Hn,))``. A row that sees no key is 0 and passes no gradient.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or heads that do not fit, an unknown backend, or one that cannot serve the arguments.
    """
    check_attention(q1, k1, q2, k2, v, packed=False)
    check_epilogue(q1.shape[:2], q1.shape[2], q2.shape[2], v.shape[-1], lam, norm_weight, gate)
    scale = q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if choose_backend(backend, softcap=softcap, return_max_logits=return_max_logits) == "sdpa":
        o_signal = sdpa.attention(q1, k1, v, scale=scale, causal=causal, window_size=window_size)
        o_noise = sdpa.attention(q2, k2, v, scale=scale, causal=causal, window_size=window_size)
        return diff_combine(
            o_signal, o_noise, lam, norm_weight=norm_weight, norm_eps=norm_eps, out_scale=out_scale, gate=gate
        )
    out, max_signal, max_noise = reference.diff_attention(
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        visible=reference.visibility_mask(
            q1.shape[1], k1.shape[1], causal=causal, window_size=window_size, device=q1.device
        ),
        softmax_scale=scale,
        softcap=softcap,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        gate=gate,
    )
    return (out, max_signal.float(), max_noise.float()) if return_max_logits else out


def diff_attn_varlen_func(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor | float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
    deterministic: bool = True,
    return_max_logits: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`diff_attn_func` over packed documents, which never attend to each other.

    Args:
        q1: (total_q, Hs, D) signal queries of all documents, one after the other.
        k1: (total_k, Hk1, D) signal keys.
        q2: (total_q, Hn, D) noise queries.
        k2: (total_k, Hk2, D) noise keys.
        v: (total_k, Hv, Dv) values.
        lam: a float, or a differentiable tensor of shape (), (Hs,) or (total_q, Hs).
        cu_seqlens_q: (documents + 1,) int32 bounds of the documents in total_q: starts at 0, never falls; equal
            neighbours are an empty document. Values are checked on the CPU; on a GPU only with ``MOTIF_CHECK=1``.
        cu_seqlens_k: the same for total_k.
        max_seqlen_q: the longest document's queries (or more).
        max_seqlen_k: the longest document's keys (or more).
        softmax_scale: see :func:`diff_attn_func`, as for all that follow.
        causal: bottom-right aligned within each document.
        window_size: inclusive (left, right) within each document.
        softcap: soft cap of the logits.
        norm_weight: (Dv,) sub-norm weight.
        norm_eps: the sub-norm's epsilon.
        out_scale: always multiplies the output.
        gate: (total_q, Hs, Dv).
        deterministic: ask for a deterministic backward pass.
        return_max_logits: also return the largest logits, over all documents.
        backend: ``"reference"``, ``"sdpa"`` or ``"auto"``.

    Returns:
        The output (total_q, Hs, Dv) in q1's dtype, with return_max_logits as in :func:`diff_attn_func`.

    Raises:
        TypeError: dtypes differ, or cu_seqlens is not int32.
        ValueError: shapes, heads or cu_seqlens that do not fit, or a backend that cannot serve the arguments.
    """
    check_attention(q1, k1, q2, k2, v, packed=True)
    check_epilogue(q1.shape[:1], q1.shape[1], q2.shape[1], v.shape[-1], lam, norm_weight, gate)
    check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q1.shape[0], max_seqlen_q)
    check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k1.shape[0], max_seqlen_k)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_q names {len(cu_seqlens_q) - 1} documents and cu_seqlens_k "
            f"{len(cu_seqlens_k) - 1}; they must be equal"
        )
    scale = q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    if choose_backend(backend, softcap=softcap, return_max_logits=return_max_logits) == "sdpa":
        k1, k2, v = k1[None], k2[None], v[None]
        o_signal = sdpa.attention(
            q1[None],
            k1,
            v,
            scale=scale,
            causal=causal,
            window_size=window_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        o_noise = sdpa.attention(
            q2[None],
            k2,
            v,
            scale=scale,
            causal=causal,
            window_size=window_size,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
        )
        return diff_combine(
            o_signal[0], o_noise[0], lam, norm_weight=norm_weight, norm_eps=norm_eps, out_scale=out_scale, gate=gate
        )
    out, max_signal, max_noise = reference.diff_attention(
        q1[None],
        k1[None],
        q2[None],
        k2[None],
        v[None],
        lam[None] if isinstance(lam, Tensor) and lam.ndim == 2 else lam,
        visible=reference.packed_visibility_mask(
            cu_seqlens_q, cu_seqlens_k, q1.shape[0], k1.shape[0], causal=causal, window_size=window_size
        ),
        softmax_scale=scale,
        softcap=softcap,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        gate=None if gate is None else gate[None],
    )
    return (out[0], max_signal.float(), max_noise.float()) if return_max_logits else out[0]
