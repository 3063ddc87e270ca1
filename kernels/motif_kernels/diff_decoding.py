"""Differential attention against a key/value cache: one to a few new queries a row, caches of
different lengths.

The Triton kernel, and for CPUs torch's attention over a group's heads as rows, read the cache in
place, each key and value once. The other backends, and calls of many queries, go to the attention
for packed documents: the keys and values that all rows hold are packed, which copies them.
"""

import torch
from torch import Tensor

from motif_kernels import dispatch
from motif_kernels.checks import check_attention, may_read
from motif_kernels.diff_attention import lam_tensor
from motif_kernels.ops import decoding as operator
from motif_kernels.ops.shortcut import is_unwatched
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache

NewTokens = tuple[Tensor | None, Tensor | None, Tensor | None]


def diff_attn_with_kvcache(
    q1: Tensor,
    k1_cache: Tensor,
    q2: Tensor | None,
    k2_cache: Tensor | None,
    v_cache: Tensor,
    lam: Tensor | float | None,
    cache_seqlens: Tensor,
    *,
    k1: Tensor | None = None,
    k2: Tensor | None = None,
    v: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    cache_leftpad: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    gate: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of new queries to what is cached, optionally appending new keys and values first;
    no gradients.

    Conventions are those of FlashAttention's ``flash_attn_with_kvcache``.

    Args:
        q1: (B, Sq, Hs, D) signal queries.
        k1_cache: (B, capacity, Hk1, D) signal keys; or, with ``block_table``,
            (blocks, block size, Hk1, D).
        q2: (B, Sq, Hn, D) noise queries. Without noise, which is softmax attention, q2, k2_cache
            and lam are None.
        k2_cache: like k1_cache, with Hk2 heads.
        v_cache: like k1_cache, with Hv heads of width Dv.
        lam: a float, or a tensor of shape (), (Hs,) or (B, Sq, Hs).
        cache_seqlens: (B,) int32, the tokens that each row's cache holds, left padding included,
            before new ones are appended. On a GPU the values are not read to be checked, unless
            ``MOTIF_CHECK=1``.
        k1: (B, Snew, Hk1, D), written into the cache in place behind each row's tokens; together
            with k2 and v.
        k2: (B, Snew, Hk2, D).
        v: (B, Snew, Hv, Dv).
        block_table: (B, blocks of a row) int32: which blocks of a paged cache hold a row's tokens,
            in order.
        num_splits: into how many parts the kernel cuts a row's cache; by default enough to fill the
            GPU.
        cache_leftpad: (B,) int32, tokens at the start of each row's cache that are padding and
            masked.
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: the last query stands at the last key, new ones included.
        window_size: inclusive (left, right) window around each query's position, -1 for unbounded.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        norm_weight: (Dv,) weight of the sub-norm, or None.
        norm_eps: the sub-norm's epsilon.
        out_scale: always multiplies the output.
        gate: (B, Sq, Hs, Dv): multiply the output by ``sigmoid(gate)``.
        backend: as in :func:`motif_kernels.diff_attn_func`; ``"triton"`` needs as many key as value
            heads to read the cache in place, and else packs it too.

    Returns:
        The output (B, Sq, Hs, Dv) in q1's dtype.

    Raises:
        TypeError: cache_seqlens, cache_leftpad or block_table is not int32, or dtypes differ.
        ValueError: shapes that do not fit, new keys without values, or more tokens than a cache has
            room for.
    """
    inputs = AttentionInputs(q1, k1_cache, q2, k2_cache, v_cache, lam_tensor(lam, q1), norm_weight, gate)
    options = AttentionOptions.of(
        q1.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        norm_eps=norm_eps,
        out_scale=out_scale,
    )
    cache = Cache(cache_seqlens, cache_leftpad, block_table, num_splits)
    return attend(inputs, cache, options, backend, new=(k1, k2, v))


def attend(
    inputs: AttentionInputs,
    cache: Cache,
    options: AttentionOptions,
    backend: str = "auto",
    *,
    new: NewTokens = (None, None, None),
) -> Tensor:
    """Check a call against a cache and serve it.

    Args:
        inputs: whose k1, k2 and v are the cache.
        cache: what rows hold, before new tokens are appended.
        options: the call's numbers.
        backend: as in :func:`motif_kernels.diff_attn_func`.
        new: k1, k2 and v to append.

    Returns:
        The output (B, Sq, Hs, Dv).

    Raises:
        TypeError: see :func:`diff_attn_with_kvcache`.
        ValueError: likewise.
    """
    q1 = inputs.q1
    check_attention(inputs, packed=False, paged=cache.block_table is not None)
    _check_lengths(q1, cache_seqlens=cache.lengths, cache_leftpad=cache.leftpad)
    _check_table(q1, cache.block_table)
    tokens = _new_tokens(inputs, new)
    reader = dispatch.choose_decoding(backend, inputs)
    with torch.no_grad(), dispatch.as_given(q1.device):
        plain = is_unwatched(*inputs, *cache)
        if tokens:
            append = operator.append if plain else operator.append_to_cache
            for added, held in tokens:
                append(held, added, cache.lengths, cache.block_table)
            cache = cache._replace(lengths=cache.lengths + tokens[0][0].shape[1])
        if plain:
            return operator.serve(inputs, cache, options, reader, backend)
        return operator.attend_to_cache(*inputs, *cache, *options, reader, backend)  # type: ignore[no-any-return]


def _new_tokens(inputs: AttentionInputs, new: NewTokens) -> list[tuple[Tensor, Tensor]]:
    """The new tokens, each with the cache it is appended to; they have its heads and widths."""
    caches = inputs.k1, inputs.k2, inputs.v
    named = [
        (n, t, c)
        for n, t, c in zip(("k1" if inputs.noise_heads else "k", "k2", "v"), new, caches, strict=True)
        if t is not None or c is not None
    ]
    given = [(name, tokens) for name, tokens, _ in named if tokens is not None]
    if not given:
        return []
    if len(given) < len(named):
        missing = ", ".join(name for name, tokens, _ in named if tokens is None)
        names = [name for name, _, _ in named]
        together = f"{', '.join(names[:-1])} and {names[-1]}"
        raise ValueError(
            f"{', '.join(name for name, _ in given)} given without {missing}: "
            f"{together} must be given together, or none"
        )
    added = given[0][1].shape[1]
    pairs = []
    for name, tokens, cache in named:
        if tokens is None or cache is None:
            raise ValueError(f"{name} was given and {name}_cache was not: softmax attention has no noise keys")
        expected = (len(inputs.q1), added, *cache.shape[2:])
        if tuple(tokens.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it must be {expected}, as q1 and its cache ask")
        if tokens.dtype != cache.dtype or tokens.device != cache.device:
            raise TypeError(
                f"{name} is {tokens.dtype} on {tokens.device} and its cache {cache.dtype} on {cache.device}; "
                "they must be equal"
            )
        pairs.append((tokens, cache))
    return pairs


def _check_lengths(q1: Tensor, **lengths: Tensor | None) -> None:
    for name, tensor in lengths.items():
        if tensor is None:
            continue
        _check_index(name, tensor, q1)
        if tuple(tensor.shape) != (len(q1),):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({len(q1)},), a number for each row")
        if name == "cache_leftpad" and may_read(tensor) and len(q1) and min(tensor.tolist()) < 0:
            raise ValueError(f"{name} holds {min(tensor.tolist())}; lengths cannot be negative")


def _check_table(q1: Tensor, block_table: Tensor | None) -> None:
    if block_table is None:
        return
    _check_index("block_table", block_table, q1)
    if block_table.ndim != 2 or len(block_table) != len(q1):
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; it must be ({len(q1)}, blocks of a row)")
    if block_table.stride(-1) != 1 and block_table.shape[1] > 1:
        raise ValueError("block_table is not contiguous in its last dimension: call block_table.contiguous()")


def _check_index(name: str, tensor: Tensor, q1: Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} is {tensor.dtype}; it must be int32")
    if tensor.device != q1.device:
        raise ValueError(f"{name} is on {tensor.device} and q1 on {q1.device}; all must be on one device")
