"""Differential attention against a key/value cache: one to a few new queries a row, caches of different lengths.

The Triton kernel reads the cache in place, each key and value once, split over its length. For the other backends the
cached keys and values of all rows are packed and handed to the attention for packed documents, which copies them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backends
from .attention import diff_attn_varlen_func
from .checks import may_read
from .operators import attention as operator

# Queries times signal heads of a key head that the kernel takes; more are prefill, which the training kernels serve.
MAX_ROWS = 32


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
    """Attention of new queries to what is cached, optionally appending new keys and values first; no gradients.

    Conventions are those of FlashAttention's ``flash_attn_with_kvcache``.

    Args:
        q1: (B, Sq, Hs, D) signal queries.
        k1_cache: (B, capacity, Hk1, D) signal keys; or, with ``block_table``, (blocks, block size, Hk1, D).
        q2: (B, Sq, Hn, D) noise queries.
        k2_cache: like k1_cache, with Hk2 heads.
        v_cache: like k1_cache, with Hv heads of width Dv.
        lam: a float, or a tensor of shape (), (Hs,) or (B, Sq, Hs).
        cache_seqlens: (B,) int32, the tokens that each row's cache holds, left padding included, before new ones are
            appended. On a GPU the values are not read to be checked, unless ``MOTIF_CHECK=1``.
        k1: (B, Snew, Hk1, D), written into the cache in place behind each row's tokens; together with k2 and v.
        k2: (B, Snew, Hk2, D).
        v: (B, Snew, Hv, Dv).
        block_table: (B, blocks of a row) int32: which blocks of a paged cache hold a row's tokens, in order.
        num_splits: into how many parts the kernel cuts a row's cache; by default enough to fill the GPU.
        cache_leftpad: (B,) int32, tokens at the start of each row's cache that are padding and seen by nobody.
        softmax_scale: multiplies the logits; default ``D ** -0.5``.
        causal: the last query stands at the last key, new ones included.
        window_size: inclusive (left, right) window around each query's position, -1 for unbounded.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        norm_weight: (Dv,) weight of the sub-norm, or None.
        norm_eps: the sub-norm's epsilon.
        out_scale: always multiplies the output.
        gate: (B, Sq, Hs, Dv): multiply the output by ``sigmoid(gate)``.
        backend: as in :func:`motif_kernels.diff_attn_func`; ``"triton"`` needs as many key as value heads to read the
            cache in place, and else packs it too.

    Returns:
        The output (B, Sq, Hs, Dv) in q1's dtype.

    Raises:
        TypeError: cache_seqlens, cache_leftpad or block_table is not int32, or dtypes differ.
        ValueError: shapes that do not fit, new keys without values, or more tokens than a cache has room for.
    """
    batch, seqlen_q = q1.shape[:2]
    _check_lengths(batch, cache_seqlens=cache_seqlens, cache_leftpad=cache_leftpad)
    _check_table(batch, block_table, k1_cache)
    new = [t for t in (k1, k2, v) if t is not None]
    if len(new) not in (0, 3):
        raise ValueError("k1, k2 and v must be given together, or none of them")
    added = new[0].shape[1] if new else 0
    capacity = k1_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    with torch.no_grad():
        total = cache_seqlens + added
        if may_read(cache_seqlens) and batch and int(total.max()) > capacity:
            raise ValueError(
                f"cache_seqlens holds {int(cache_seqlens.max())} and {added} tokens are to be appended, but a row's "
                f"cache has room for {capacity}"
            )
        slots = _slots(batch, capacity, block_table, k1_cache)
        for cache, tokens in zip((k1_cache, k2_cache, v_cache), new, strict=False):
            positions = cache_seqlens[:, None].long() + torch.arange(added, device=cache.device)
            cache.flatten(0, 1)[slots.gather(1, positions).flatten()] = tokens.flatten(0, 1)
        if _kernel_serves(backend, q1, k1_cache, q2, k2_cache, v_cache, gate):
            from .triton.decoding import decode

            left, right = backends.kernel_window(causal, window_size)
            return decode(
                q1,
                k1_cache,
                q2,
                k2_cache,
                v_cache,
                lam if isinstance(lam, Tensor) else torch.full((), lam, device=q1.device),
                total,
                leftpad=cache_leftpad,
                block_table=block_table,
                num_splits=num_splits,
                softmax_scale=q1.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
                left=left,
                right=right,
                softcap=softcap,
                norm_weight=norm_weight,
                norm_eps=norm_eps,
                out_scale=out_scale,
                gate=gate,
            )
        start = torch.zeros_like(total) if cache_leftpad is None else cache_leftpad
        position = torch.arange(capacity, device=slots.device)
        held = slots[(position >= start[:, None]) & (position < total[:, None])]
        lengths = (total - start).clamp(min=0)
        out = diff_attn_varlen_func(
            q1.flatten(0, 1),
            k1_cache.flatten(0, 1)[held],
            q2.flatten(0, 1),
            k2_cache.flatten(0, 1)[held],
            v_cache.flatten(0, 1)[held],
            lam.flatten(0, 1) if isinstance(lam, Tensor) and lam.ndim == 3 else lam,
            torch.arange(0, (batch + 1) * seqlen_q, seqlen_q, dtype=torch.int32, device=q1.device)[: batch + 1],
            torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int(),
            seqlen_q,
            capacity,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            out_scale=out_scale,
            gate=None if gate is None else gate.flatten(0, 1),
            backend=backend,
        )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, seqlen_q))


def _kernel_serves(
    backend: str, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gate: Tensor | None
) -> bool:
    """Whether the decoding kernel runs. If "triton" was asked for and cannot serve at all, packing tells why."""
    if backend not in ("auto", "triton") or (backend == "auto" and q1.device.type != "cuda"):
        return False
    same_heads = k1.shape[2] == k2.shape[2] == v.shape[2] and q2.shape[2] % v.shape[2] == 0
    dense = all(t.stride(-1) == 1 for t in (q1, k1, q2, k2, v))
    few = q1.shape[1] * q1.shape[2] // v.shape[2] <= MAX_ROWS
    if not (same_heads and dense and few and q1.numel() and v.numel()):
        return False
    return backends.refusal_by_triton_on(q1.device) is None and operator.refusal(q1, k1, q2, k2, v, gate, None) is None


def _slots(batch: int, capacity: int, block_table: Tensor | None, cache: Tensor) -> Tensor:
    """Where in the flattened cache each row's positions lie: (B, capacity)."""
    position = torch.arange(capacity, device=cache.device)
    size = cache.shape[1]
    if block_table is None:
        return torch.arange(batch, device=cache.device)[:, None] * size + position
    return block_table.long()[:, position // size] * size + position % size


def _check_lengths(batch: int, **lengths: Tensor | None) -> None:
    for name, tensor in lengths.items():
        if tensor is None:
            continue
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} is {tensor.dtype}; it must be int32")
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be ({batch},), a number for each row")
        if may_read(tensor) and batch and int(tensor.min()) < 0:
            raise ValueError(f"{name} holds {int(tensor.min())}; lengths cannot be negative")


def _check_table(batch: int, block_table: Tensor | None, cache: Tensor) -> None:
    if block_table is None:
        if len(cache) != batch:
            raise ValueError(
                f"k1_cache has {len(cache)} rows and q1 has {batch}; they must be equal, or give block_table"
            )
        return
    if block_table.dtype != torch.int32:
        raise TypeError(f"block_table is {block_table.dtype}; it must be int32")
    if block_table.ndim != 2 or len(block_table) != batch:
        raise ValueError(f"block_table has shape {tuple(block_table.shape)}; it must be ({batch}, blocks of a row)")
    if may_read(block_table) and block_table.numel():
        smallest, largest = int(block_table.min()), int(block_table.max())
        if smallest < 0 or largest >= len(cache):
            wrong = smallest if smallest < 0 else largest
            raise ValueError(f"block_table names block {wrong}; the cache has blocks 0 to {len(cache) - 1}")
