"""Softmax attention: the functions of differential attention without noise.

Same kernels, backends, masks and options, for a baseline that differs in nothing else.
"""

from typing import TypedDict, Unpack

from torch import Tensor

from motif_kernels.diff_attention import diff_attn_func, diff_attn_varlen_func
from motif_kernels.diff_decoding import diff_attn_with_kvcache


class CacheOptions(TypedDict, total=False):
    """Keyword arguments of all three functions; :func:`motif_kernels.diff_attn_func` describes
    them.
    """

    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    norm_weight: Tensor | None
    norm_eps: float
    out_scale: float
    gate: Tensor | None
    backend: str


class Options(CacheOptions, total=False):
    """Those of attention with a backward pass."""

    deterministic: bool
    return_max_logits: bool


def softmax_attn_func(q: Tensor, k: Tensor, v: Tensor, **options: Unpack[Options]) -> Tensor | tuple[Tensor, ...]:
    """Softmax attention: :func:`motif_kernels.diff_attn_func` without noise.

    Args:
        q: (B, Sq, H, D) queries, there q1.
        k: (B, Sk, Hk, D) keys, there k1; H a multiple of Hk.
        v: (B, Sk, Hv, Dv) values; H a multiple of Hv.
        **options: ``softmax_scale``, ``causal``, ``window_size``, ``softcap``, ``norm_weight``,
            ``norm_eps``, ``out_scale``, ``gate``, ``deterministic``, ``return_max_logits`` and
            ``backend``, as there.

    Returns:
        The output (B, Sq, H, Dv) in q's dtype; with return_max_logits ``(out, max_logits (H,))``. A
        fully masked row is 0 and passes no gradient.

    Raises:
        TypeError: dtypes differ or are not floating point.
        ValueError: shapes or heads that do not fit, an unknown backend, or one that cannot serve
            the arguments.
    """
    return diff_attn_func(q, k, None, None, v, None, **options)


def softmax_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Unpack[Options],
) -> Tensor | tuple[Tensor, ...]:
    """:func:`softmax_attn_func` over packed documents, which never attend to each other.

    Args:
        q: (total_q, H, D).
        k: (total_k, Hk, D).
        v: (total_k, Hv, Dv).
        cu_seqlens_q: (documents + 1,) int32 bounds in total_q.
        cu_seqlens_k: (documents + 1,) int32 bounds in total_k.
        max_seqlen_q: the longest document's queries (or more).
        max_seqlen_k: the longest document's keys (or more).
        **options: those of :func:`softmax_attn_func`.

    Returns:
        The output (total_q, H, Dv) in q's dtype, with return_max_logits as there.

    Raises:
        TypeError: dtypes differ, or cu_seqlens is not int32.
        ValueError: shapes, heads or cu_seqlens that do not fit, or a backend that cannot serve.
    """
    bounds = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return diff_attn_varlen_func(q, k, None, None, v, None, *bounds, **options)


def softmax_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    cache_leftpad: Tensor | None = None,
    **options: Unpack[CacheOptions],
) -> Tensor:
    """Softmax attention of new queries to what is cached:
    :func:`motif_kernels.diff_attn_with_kvcache` without noise.

    Args:
        q: (B, Sq, H, D).
        k_cache: (B, capacity, Hk, D); or, with ``block_table``, (blocks, block size, Hk, D).
        v_cache: like k_cache, with Hv heads of width Dv.
        cache_seqlens: (B,) int32, the tokens that each row holds before new ones are appended.
        k: (B, Snew, Hk, D), written into the cache in place behind each row's tokens; with v.
        v: (B, Snew, Hv, Dv).
        block_table: (B, blocks of a row) int32: which blocks of a paged cache hold a row's tokens.
        num_splits: into how many parts the kernel cuts a row's cache.
        cache_leftpad: (B,) int32, tokens at the start of each row that are padding and masked.
        **options: those of :func:`softmax_attn_func`, but ``deterministic`` and
            ``return_max_logits``.

    Returns:
        The output (B, Sq, H, Dv) in q's dtype.

    Raises:
        TypeError: cache_seqlens, cache_leftpad or block_table is not int32, or dtypes differ.
        ValueError: shapes that do not fit, new keys without values, or more tokens than a cache has
            room for.
    """
    return diff_attn_with_kvcache(
        q,
        k_cache,
        None,
        None,
        v_cache,
        None,
        cache_seqlens,
        k1=k,
        v=v,
        block_table=block_table,
        num_splits=num_splits,
        cache_leftpad=cache_leftpad,
        **options,
    )
