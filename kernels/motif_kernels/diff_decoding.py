"""Differential attention against a key/value cache: one to a few new queries a row, caches of
different lengths.

The Triton kernel, and for CPUs torch's attention over a group's heads as rows, read the cache in
place, each key and value once. The other backends, and calls of many queries, go to the attention
for packed documents: the keys and values that all rows hold are packed, which copies them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from motif_kernels import dispatch
from motif_kernels.checks import check_attention, check_epilogue, may_read
from motif_kernels.ops import decoding as operator
from motif_kernels.ops import diff_attention as attention_operator
from motif_kernels.ops import needs_no_operator
from motif_kernels.reference import compute_dtype

# Queries times signal heads of a key head that are decoding; more are prefill, which the training
# kernels serve.
MAX_DECODE_QUERY_ROWS = 32


def diff_attn_with_kvcache(
    q1: Tensor,
    k1_cache: Tensor,
    q2: Tensor,
    k2_cache: Tensor,
    v_cache: Tensor,
    lam: Tensor | float,
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
        q2: (B, Sq, Hn, D) noise queries.
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
        cache_leftpad: (B,) int32, tokens at the start of each row's cache that are padding and seen
            by nobody.
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
    check_attention(q1, k1_cache, q2, k2_cache, v_cache, packed=False, paged=block_table is not None)
    check_epilogue(q1.shape[:2], q1.shape[2], q2.shape[2], v_cache.shape[-1], lam, norm_weight, gate, q1.device)
    _check_lengths(q1, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad)
    _check_table(q1, block_table)
    added = _check_new_tokens({"k1": (k1, k1_cache), "k2": (k2, k2_cache), "v": (v, v_cache)}, len(q1))
    implementation = _implementation(backend, q1, k1_cache, q2, k2_cache, v_cache, gate)
    left, right = dispatch.kernel_window(causal, window_size)
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=compute_dtype(q1), device=q1.device)
    with torch.no_grad():
        plain = needs_no_operator(q1)
        if k1 is not None and k2 is not None and v is not None:
            append = operator.append if plain else operator.append_to_cache
            append(k1_cache, k1, cache_seqlens, block_table)
            append(k2_cache, k2, cache_seqlens, block_table)
            append(v_cache, v, cache_seqlens, block_table)
        attend = operator.attend if plain else operator.attend_to_cache
        return attend(
            *operator.Tensors(
                q1=q1,
                k1_cache=k1_cache,
                q2=q2,
                k2_cache=k2_cache,
                v_cache=v_cache,
                lam=lam,
                lengths=cache_seqlens + added if added else cache_seqlens,
                leftpad=cache_leftpad,
                block_table=block_table,
                norm_weight=norm_weight,
                gate=gate,
            ),
            *operator.Options(
                num_splits=num_splits,
                softmax_scale=q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
                left=left,
                right=right,
                softcap=softcap,
                norm_eps=norm_eps,
                out_scale=out_scale,
                implementation=implementation,
                packed_backend=backend,
            ),
        )


def _implementation(
    backend: str, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gate: Tensor | None
) -> str:
    """Which of the operator's implementations runs. If one asked for cannot serve at all, packing
    tells why.
    """
    same_heads = k1.shape[2] == k2.shape[2] == v.shape[2] and q2.shape[2] % v.shape[2] == 0
    few = q1.shape[1] * q1.shape[2] // v.shape[2] <= MAX_DECODE_QUERY_ROWS
    if not (same_heads and few):
        return "packed"
    on_gpu = q1.device.type == "cuda"
    if backend == "triton" or (backend == "auto" and on_gpu):
        unsupported_reason = dispatch.triton_unsupported_reason(q1.device) or attention_operator.unsupported_reason(
            q1, k1, q2, k2, v, gate, None
        )
        return "packed" if unsupported_reason else "triton"
    return "cpu" if backend == "sdpa" or (backend == "auto" and not on_gpu) else "packed"


def _check_new_tokens(new: dict[str, tuple[Tensor | None, Tensor]], batch: int) -> int:
    """How many tokens a row gets; they have the caches' heads and widths."""
    given = {name: (tokens, cache) for name, (tokens, cache) in new.items() if tokens is not None}
    if not given:
        return 0
    if len(given) < len(new):
        missing = ", ".join(name for name in new if name not in given)
        raise ValueError(f"{', '.join(given)} given without {missing}: k1, k2 and v must be given together, or none")
    added = next(iter(given.values()))[0].shape[1]
    for name, (tokens, cache) in given.items():
        expected = (batch, added, *cache.shape[2:])
        if tuple(tokens.shape) != expected:
            raise ValueError(f"{name} has shape {tuple(tokens.shape)}; it must be {expected}, as q1 and its cache ask")
        if tokens.dtype != cache.dtype or tokens.device != cache.device:
            raise TypeError(
                f"{name} is {tokens.dtype} on {tokens.device} and its cache {cache.dtype} on {cache.device}; "
                "they must be equal"
            )
    return added


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
