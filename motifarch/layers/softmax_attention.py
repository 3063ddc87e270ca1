"""Softmax attention with grouped queries: the baseline, sharing every other line with the
differential layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from motif_kernels.softmax import softmax_attn_func, softmax_attn_varlen_func, softmax_attn_with_kvcache
from motifarch.layers.base_attention import BaseAttention
from motifarch.layers.cache import CachePosition
from motifarch.layers.padding import PaddingMask
from motifarch.layers.rotary import PositionEmbeddings


class SoftmaxAttention(BaseAttention):
    """Causal multi-head attention with num_heads queries over num_kv_heads keys and values of the
    same width.

    Args:
        hidden_size: e.
        num_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: key/value heads.
        head_dim: d.
        layer_idx: position in the model from 0: the cache's key.
        qk_norm: RMS-normalise each query and key head before the rotation.
        qk_norm_eps: its epsilon.
        window_size: inclusive (left, right) attention window, -1 for unbounded.
        causal: a token sees none after it; False is for encoders, and takes no cache.
        softmax_scale: multiplies the logits; default ``head_dim ** -0.5``.
        bias: biases in the four projections.
        backend: motif_kernels' backend.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: num_heads is not a multiple of num_kv_heads.
    """

    last_lambda: Tensor | None = None

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        window_size: tuple[int, int] = (-1, -1),
        causal: bool = True,
        softmax_scale: float | None = None,
        bias: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        super().__init__(
            hidden_size,
            query_width=num_heads * head_dim,
            key_width=num_kv_heads * head_dim,
            value_width=num_kv_heads * head_dim,
            out_width=num_heads * head_dim,
            head_dim=head_dim,
            layer_idx=layer_idx,
            qk_norm=qk_norm,
            qk_norm_eps=qk_norm_eps,
            window_size=window_size,
            causal=causal,
            softmax_scale=softmax_scale,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        past_key_values: Any | None = None,
        padding: PaddingMask | None = None,
        cache_position: CachePosition | None = None,
    ) -> Tensor:
        """Attention over a batch, packed documents, or new tokens after a cache.

        Args:
            hidden_states: (B, S, E); packed documents are one row (1, total, E).
            position_embeddings: cosines and sines (B or 1, S, head_dim) from RotaryEmbedding; None
                leaves positions out.
            cu_seqlens: (documents + 1,) int32 bounds of packed documents, which never attend to
                each other.
            max_seqlen: the longest document (or more); with cu_seqlens.
            past_key_values: a transformers Cache of num_kv_heads heads of width head_dim.
            padding: which tokens of a padded batch are real, cached ones included.
            cache_position: where past_key_values stands before this call; by default it is asked.
                With tokens padded on the left in the cache, it says how many.

        Returns:
            Tensor (B, S, E).

        Raises:
            ValueError: gradients are wanted through a cache that is written in place, or arguments
                do not fit.
        """
        q, key = self._queries_and_keys(hidden_states, position_embeddings)
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key, value, bounds = self._append(
            key, value, past_key_values, cache_position, needs_full_cache=padding is not None
        )
        out = self._attend(
            softmax_attn_func,
            softmax_attn_varlen_func,
            softmax_attn_with_kvcache,
            queries={"q": q},
            keys={"k": key, "v": value},
            cache_bounds=bounds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            padding=padding,
        )
        return self.o_proj(out.flatten(2))

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, window_size={self.window_size}"
