"""What every attention layer shares: head shapes, positions, the cache, and packed or padded
batches.

Shapes: B batch, S tokens, E hidden size, D query/key head width, Dv value head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motifarch.layers.cache import CachePosition
from motifarch.layers.padding import PaddingMask
from motifarch.layers.rotary import PositionEmbeddings, apply_rotary
from motifarch.layers.ulysses import gather_heads, scatter_heads, sum_gradient


class BaseAttention(nn.Module):
    """Base of the attention layers: projections, rotary embeddings, cache and packing around a
    subclass's attention.

    A subclass sets the widths of its projections and says how heads are split into signal and
    noise.
    """

    paired_kv = False
    """Whether key heads come in pairs, one for signal and one for noise, with values of double
    width.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        query_width: int,
        key_width: int,
        value_width: int,
        out_width: int,
        head_dim: int,
        layer_idx: int,
        qk_norm: bool,
        qk_norm_eps: float,
        window_size: tuple[int, int],
        causal: bool,
        softmax_scale: float | None,
        bias: bool,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.head_dim, self.layer_idx = head_dim, layer_idx
        self.window_size, self.causal = tuple(window_size), causal
        self.softmax_scale, self.backend = softmax_scale, backend
        self.q_proj = nn.Linear(hidden_size, query_width, bias=bias, **factory)
        self.k_proj = nn.Linear(hidden_size, key_width, bias=bias, **factory)
        self.v_proj = nn.Linear(hidden_size, value_width, bias=bias, **factory)
        self.o_proj = nn.Linear(out_width, hidden_size, bias=bias, **factory)
        self.tensor_group: ProcessGroup | None = None
        """Ranks that each hold some of the heads (tensor parallelism): set from outside, with
        projections to match.
        """
        self.context_group: ProcessGroup | None = None
        """Ranks that each hold a part of the sequence (context parallelism): set from outside."""
        self.record_max_logits = False
        """Whether forward passes in training mode record each head's largest logit, for QK-clip."""
        self.max_logits: tuple[Tensor, Tensor | None] | None = None
        """Largest scaled, visible logits since this was last cleared, of the signal heads (Hs,) and
        noise heads (Hn,) that this rank computes; None without noise heads.
        """
        self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps, **factory) if qk_norm else None

    def _queries_and_keys(
        self, hidden_states: Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[Tensor, Tensor]:
        """Projected, optionally normalised and rotated: (B, S, H, D) and (B, S, Hk, D)."""
        q = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normalised(q, self.q_norm), self._normalised(k, self.k_norm)
        if position_embeddings is not None:
            q, k = apply_rotary(q, position_embeddings), apply_rotary(k, position_embeddings)
        return q, k

    def _shared(self, parameter: Tensor) -> Tensor:
        """What all heads use: with tensor parallelism each rank's heads give a part of its
        gradient.
        """
        return sum_gradient(parameter, self.tensor_group)

    def _normalised(self, x: Tensor, norm: nn.RMSNorm) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), self._shared(norm.weight), norm.eps)

    def _append(
        self,
        key: Tensor,
        value: Tensor,
        past_key_values: Any | None,
        position: CachePosition | None,
        *,
        needs_full_cache: bool,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor | None] | None]:
        """Append to the cache, and say what the queries attend to.

        Args:
            key: (B, S, heads, width), this call's.
            value: (B, S, heads, Dv).
            past_key_values: a transformers Cache or a PagedCache, or None.
            position: where the cache stands; by default the cache is asked.
            needs_full_cache: a mask follows that speaks of every cached token.

        Returns:
            Keys and values, (B, Sk, heads, width) or pages, and for a cache that held tokens
            before, the bounds that the attention to a cache takes.

        Raises:
            ValueError: gradients are wanted through a cache that is written in place, or the layer
                is not causal.
        """
        if past_key_values is None:
            return key, value, None
        if not self.causal:
            raise ValueError("a layer with causal=False takes no past_key_values: its tokens see those that follow")
        position = CachePosition.of(past_key_values, self.layer_idx, key) if position is None else position
        in_place = bool(getattr(past_key_values, "is_compileable", False)) or hasattr(past_key_values, "append")
        if in_place and torch.is_grad_enabled() and key.requires_grad:
            raise ValueError(
                f"a {type(past_key_values).__name__} gives no gradients, for it is written in place; call under "
                "torch.no_grad(), or take a DynamicCache"
            )
        if hasattr(past_key_values, "append") and not needs_full_cache:
            keys, values, lengths, table = past_key_values.append(key, value, self.layer_idx)
            if position.is_start:
                return key, value, None
            bounds = {"cache_seqlens": lengths, "cache_leftpad": position.leftpad, "block_table": table}
            return keys, values, bounds
        keys, values = past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        if position.is_start:
            return key, value, None
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if needs_full_cache or (torch.is_grad_enabled() and keys.requires_grad):
            return keys, values, None
        lengths, leftpad = position.within(keys.shape[1])
        return keys, values, {"cache_seqlens": lengths, "cache_leftpad": leftpad}

    def _attend(
        self,
        dense: Callable[..., Any],
        varlen: Callable[..., Any],
        with_kvcache: Callable[..., Any],
        *,
        queries: dict[str, Tensor],
        keys: dict[str, Tensor],
        per_query: dict[str, Tensor | None] | None = None,
        cache_bounds: dict[str, Tensor | None] | None,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        padding: PaddingMask | None,
        **options: Any,
    ) -> Tensor:
        """Call ``dense``, ``varlen`` or ``with_kvcache``, as the batch is plain, packed or padded,
        or goes on.

        Args:
            dense: attention on a batch.
            varlen: the same on packed documents.
            with_kvcache: the same on a cache, with "_cache" behind the keys' names.
            queries: its arguments that have a row for each query, (B, Sq, heads, width).
            keys: its arguments that have a row for each key, (B, Sk, heads, width).
            per_query: what else has a row for each query, (B, Sq, ...), or is None.
            cache_bounds: what of a cache is held, from :meth:`_append`; None if the keys are to be
                taken as they are.
            cu_seqlens: bounds of packed documents.
            max_seqlen: the longest of them.
            padding: which tokens of a padded batch are real.
            **options: passed on.

        Returns:
            Tensor (B, Sq, heads, Dv); rows of padding are 0.
        """
        options |= {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "backend": self.backend,
        }
        per_query = per_query or {}
        if self.record_max_logits and self.training:
            dense, varlen = partial(self._record, dense), partial(self._record, varlen)
        if self.context_group is not None:
            return self._attend_in_context(
                dense if cu_seqlens is None else varlen,
                queries,
                keys,
                per_query,
                cu_seqlens,
                max_seqlen,
                refused="a cache" if cache_bounds is not None else "padding" if padding is not None else None,
                options=options,
            )
        if cache_bounds is not None:
            caches = {f"{name}_cache": t for name, t in keys.items()}
            return with_kvcache(**queries, **caches, **per_query, **cache_bounds, **options)
        if cu_seqlens is None and padding is None:
            return dense(**queries, **keys, **per_query, **options)

        batch, seqlen = next(iter(queries.values())).shape[:2]
        flat_queries = {n: t if t is None else t.flatten(0, 1) for n, t in (queries | per_query).items()}
        flat_keys = {n: t.flatten(0, 1) for n, t in keys.items()}
        if padding is None:
            if max_seqlen is None:
                raise ValueError("cu_seqlens was given without max_seqlen; give both for packed documents")
            out = varlen(
                **flat_queries,
                **flat_keys,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen,
                **options,
            )
            return out.unflatten(0, (batch, seqlen))

        packed = padding.pack(next(iter(keys.values())).shape[1])
        out = varlen(
            **{n: t if t is None else t[packed.query_index] for n, t in flat_queries.items()},
            **{n: t[packed.key_index] for n, t in flat_keys.items()},
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_k,
            max_seqlen_q=packed.max_seqlen_q,
            max_seqlen_k=packed.max_seqlen_k,
            **options,
        )
        padded = out.new_zeros(batch * seqlen, *out.shape[1:]).index_copy(0, packed.query_index, out)
        return padded.unflatten(0, (batch, seqlen))

    def _record(self, attend: Callable[..., Any], **arguments: Any) -> Tensor:
        """Attention that leaves its largest logits, or those of the calls before it, in
        :attr:`max_logits`.
        """
        out, *found = attend(**arguments, return_max_logits=True)
        before = self.max_logits or (None, None)
        # A maximum in the first call too: a call that is computed again must do what it did, or
        # checkpointing is lost.
        found = [torch.maximum(f, f if t is None else t) for f, t in zip(found, before, strict=False)]
        self.max_logits = found[0], found[1] if len(found) > 1 else None
        return out  # type: ignore[no-any-return]

    def _attend_in_context(
        self,
        attend: Callable[..., Any],
        queries: dict[str, Tensor],
        keys: dict[str, Tensor],
        per_query: dict[str, Tensor | None],
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        *,
        refused: str | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Attention whose ranks hold parts of the sequence: they exchange these for heads, and
        back.
        """
        assert self.context_group is not None
        if refused is not None:
            raise ValueError(f"context parallelism does not serve {refused}; pack documents instead (cu_seqlens)")
        tensors = {n: t for n, t in (queries | keys | per_query).items() if t is not None}
        # Lambda for each token and head, (B, S, Hs), lacks a width.
        wide = [t[..., None] if t.ndim == 3 else t for t in tensors.values()]
        exchanged = scatter_heads(wide, self.context_group)
        whole: dict[str, Tensor | None] = dict.fromkeys(per_query)
        for (name, tensor), arrived in zip(tensors.items(), exchanged, strict=True):
            whole[name] = arrived.squeeze(-1) if tensor.ndim == 3 else arrived
        if cu_seqlens is not None:
            if max_seqlen is None:
                raise ValueError("cu_seqlens was given without max_seqlen; give both for packed documents")
            batch = next(iter(queries.values())).shape[0]
            whole = {n: None if t is None else t.flatten(0, 1) for n, t in whole.items()}
            bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
            out = attend(**whole, **bounds, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen, **options)
            out = out.unflatten(0, (batch, -1))
        else:
            out = attend(**whole, **options)
        return gather_heads(out, self.context_group)


def check_heads(num_heads: int, num_noise_heads: int, num_kv_heads: int, *, paired_keys: bool) -> None:
    """Raise ValueError unless the heads divide: signal heads by noise heads, noise heads by
    key/value heads.

    Args:
        num_heads: signal and noise heads together.
        num_noise_heads: noise heads.
        num_kv_heads: key/value heads; with ``paired_keys`` they come in pairs (k1, k2).
        paired_keys: whether signal and noise have keys of their own.
    """
    if num_noise_heads < 1 or num_heads <= num_noise_heads or num_heads % num_noise_heads:
        raise ValueError(
            f"num_heads={num_heads} (signal and noise) cannot be cut into num_noise_heads={num_noise_heads} "
            "equal groups of signal heads and a noise head; it must be a multiple of num_noise_heads, at least twice it"
        )
    if paired_keys and num_kv_heads % 2:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} must be even: key heads come in pairs, one for signal and one for noise"
        )
    key_heads = num_kv_heads // 2 if paired_keys else num_kv_heads
    if key_heads < 1 or num_noise_heads % key_heads:
        raise ValueError(
            f"num_noise_heads={num_noise_heads} is not a multiple of the {key_heads} key/value "
            f"{'pairs' if paired_keys else 'heads'} that num_kv_heads={num_kv_heads} gives; "
            "choose num_kv_heads so that it is"
        )
