"""The public attention functions: they check their arguments and hand the call to a backend."""

import torch
from torch import Tensor

from motif_kernels import dispatch
from motif_kernels.reference import compute_dtype
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences


def diff_attn_func(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | float | None,
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
) -> Tensor | tuple[Tensor, ...]:
    """Differential attention: ``softmax(q1 k1^T) v - lam * softmax(q2 k2^T) v``, then sub-norm,
    gate or neither.

    Signal head h is paired with noise head ``h // (Hs / Hn)``; the noise product is computed once a
    noise head. Key and value heads may be fewer (grouped queries). Sources: Differential
    Transformer, arXiv 2410.05258 (Hs = Hn); Grouped Differential Attention, arXiv 2510.06949
    (Hs = g Hn). Conventions are FlashAttention's.

    Args:
        q1: (B, Sq, Hs, D) signal queries.
        k1: (B, Sk, Hk1, D) signal keys, Hs a multiple of Hk1.
        q2: (B, Sq, Hn, D) noise queries, Hs a multiple of Hn. Without noise, which is softmax
            attention, q2, k2 and lam are None.
        k2: (B, Sk, Hk2, D) noise keys, Hn a multiple of Hk2; may be k1 itself.
        v: (B, Sk, Hv, Dv) values, Hn a multiple of Hv.
        lam: a float, or a differentiable tensor of shape (), (Hs,) or (B, Sq, Hs).
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: hide later keys; the last query is aligned with the last key (bottom right).
        window_size: inclusive (left, right) window around each query's position, -1 for unbounded.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        norm_weight: (Dv,) weight of the sub-norm (RMSNorm of each head's output), or None for no
            sub-norm.
        norm_eps: the sub-norm's epsilon.
        out_scale: always multiplies the output.
        gate: (B, Sq, Hs, Dv): multiply the output by ``sigmoid(gate)``. Not together with
            norm_weight.
        deterministic: the backward pass gives the same bits every time. False lets ``"triton"`` and
            ``"flash"`` add gradients in the order in which they come, which is less work.
        return_max_logits: also return each head's largest scaled, unmasked logit over the batch
            (float32, no gradient). Where logits are NaN, ``"triton"`` gives the largest number and
            ``"reference"`` NaN.
        backend: ``"triton"`` (one fused kernel), ``"flash"`` (flash-attn 4 or 2, composed),
            ``"sdpa"`` (torch's attention, composed), ``"cpu"`` (blocked products, composed),
            ``"reference"`` (plain mathematics), or ``"auto"``: the fastest that can serve the
            arguments.

    Returns:
        The output (B, Sq, Hs, Dv) in q1's dtype, whatever autocast says, which attention does not
        heed; with return_max_logits ``(out, max_signal (Hs,), max_noise (Hn,))``. A fully masked
        row is 0 and passes no gradient.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or heads that do not fit, an unknown backend, or one that cannot serve
            the arguments.
    """
    inputs = AttentionInputs(q1, k1, q2, k2, v, lam_tensor(lam, q1), norm_weight, gate)
    options = AttentionOptions.of(
        q1.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        norm_eps=norm_eps,
        out_scale=out_scale,
        deterministic=deterministic,
        return_max_logits=return_max_logits,
    )
    results = dispatch.attend(inputs, options, backend=backend)
    return results if return_max_logits else results[0]


def diff_attn_varlen_func(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor | None,
    k2: Tensor | None,
    v: Tensor,
    lam: Tensor | float | None,
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
) -> Tensor | tuple[Tensor, ...]:
    """:func:`diff_attn_func` over packed documents, which never attend to each other.

    Args:
        q1: (total_q, Hs, D) signal queries of all documents, one after the other.
        k1: (total_k, Hk1, D) signal keys.
        q2: (total_q, Hn, D) noise queries; q2, k2 and lam are None for softmax attention.
        k2: (total_k, Hk2, D) noise keys.
        v: (total_k, Hv, Dv) values.
        lam: a float, or a differentiable tensor of shape (), (Hs,) or (total_q, Hs).
        cu_seqlens_q: (documents + 1,) int32 bounds of the documents in total_q: starts at 0, never
            falls; equal neighbours are an empty document. Tokens after the last one give 0 and get
            gradients of 0. Values are checked on the CPU; on a GPU only with ``MOTIF_CHECK=1``.
        cu_seqlens_k: the same for total_k.
        max_seqlen_q: the longest document's queries (or more). ``"triton"`` does not need it; to
            ``"flash"`` one too small leaves what is beyond it undefined.
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
        backend: as in :func:`diff_attn_func`.

    Returns:
        The output (total_q, Hs, Dv) in q1's dtype, with return_max_logits as in
        :func:`diff_attn_func`.

    Raises:
        TypeError: dtypes differ, or cu_seqlens is not int32.
        ValueError: shapes, heads or cu_seqlens that do not fit, or a backend that cannot serve the
            arguments.
    """
    inputs = AttentionInputs(q1, k1, q2, k2, v, lam_tensor(lam, q1), norm_weight, gate)
    options = AttentionOptions.of(
        q1.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        norm_eps=norm_eps,
        out_scale=out_scale,
        deterministic=deterministic,
        return_max_logits=return_max_logits,
    )
    documents = Sequences(max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k)
    results = dispatch.attend(inputs, options, documents, backend)
    return results if return_max_logits else results[0]


def lam_tensor(lam: Tensor | float | None, q: Tensor) -> Tensor | None:
    """Lambda as a tensor beside q, in the dtype that arithmetic runs in, if it is a number."""
    if lam is None or isinstance(lam, Tensor):
        return lam
    return torch.full((), lam, dtype=compute_dtype(q), device=q.device)
