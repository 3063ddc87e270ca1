"""DIFF V2 (Microsoft, January 2026): values of single width, lambda from the token; also grouped
and gated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from motif_kernels import diff_attn_func, diff_attn_varlen_func, diff_attn_with_kvcache
from motifarch.layers.base_attention import BaseAttention, check_heads
from motifarch.layers.cache import CachePosition
from motifarch.layers.padding import PaddingMask
from motifarch.layers.rotary import PositionEmbeddings


class DifferentialAttentionV2(BaseAttention):
    """Twice the query heads over unchanged keys and values; ``lambda = sigmoid(x W)`` for each
    token and signal head.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head]
    (adjacent pairs for g = 1), and all heads of a block share one key/value head, for signal and
    noise alike. There is no sub-norm and no lambda_init by default.

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together.
        num_kv_heads: key/value heads; must divide num_noise_heads.
        head_dim: d, width of query, key and value heads.
        layer_idx: position in the model from 0: the cache's key.
        num_noise_heads: default half of num_heads.
        gate: multiply the difference by ``sigmoid(x W_gate)``, elementwise.
        sub_norm: normalise each head's output (not together with gate).
        lambda_init: a constant added to lambda; with the sub-norm the output is scaled by
            ``1 - lambda_init``.
        norm_eps: the sub-norm's epsilon.
        qk_norm: RMS-normalise each query and key head before the rotation.
        qk_norm_eps: its epsilon.
        window_size: inclusive (left, right) attention window, -1 for unbounded.
        causal: a token sees none after it; False is for encoders, and takes no cache.
        softmax_scale: multiplies the logits; default ``head_dim ** -0.5``.
        bias: biases in the four projections (never in lambda's or the gate's).
        backend: motif_kernels' backend.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: heads that do not divide, or gate together with sub_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        num_noise_heads: int | None = None,
        gate: bool = False,
        sub_norm: bool = False,
        lambda_init: float = 0.0,
        norm_eps: float = 1e-5,
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
        noise_heads = num_heads // 2 if num_noise_heads is None else num_noise_heads
        check_heads(num_heads, noise_heads, num_kv_heads, paired_keys=False)
        if gate and sub_norm:
            raise ValueError("gate and sub_norm are both on; choose one epilogue")
        signal_heads = num_heads - noise_heads
        super().__init__(
            hidden_size,
            query_width=num_heads * head_dim,
            key_width=num_kv_heads * head_dim,
            value_width=num_kv_heads * head_dim,
            out_width=signal_heads * head_dim,
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
        self.num_heads, self.num_noise_heads, self.num_kv_heads = num_heads, noise_heads, num_kv_heads
        self.lambda_init = lambda_init
        self.lambda_proj = nn.Linear(hidden_size, signal_heads, bias=False, device=device, dtype=dtype)
        self.gate_proj = (
            nn.Linear(hidden_size, signal_heads * head_dim, bias=False, device=device, dtype=dtype) if gate else None
        )
        self.subln = nn.RMSNorm(head_dim, eps=norm_eps, device=device, dtype=dtype) if sub_norm else None
        self.last_lambda: Tensor | None = None

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda of each token and signal head, (B, S, Hs), float32 (float64)."""
        logits = self.lambda_proj(hidden_states)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) + self.lambda_init

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
        group = self.num_heads // self.num_noise_heads - 1
        q = q.unflatten(2, (-1, group + 1))  # all noise heads, or those of this rank
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        key, value, bounds = self._append(
            key, value, past_key_values, cache_position, needs_full_cache=padding is not None
        )
        lam = self.compute_lambda(hidden_states)
        self.last_lambda = lam.detach().mean()
        gate = None
        if self.gate_proj is not None:
            gate = self.gate_proj(hidden_states).unflatten(-1, (-1, self.head_dim))

        out = self._attend(
            diff_attn_func,
            diff_attn_varlen_func,
            diff_attn_with_kvcache,
            queries={"q1": q[..., :group, :].flatten(2, 3), "q2": q[..., group, :]},
            keys={"k1": key, "k2": key, "v": value},
            per_query={"lam": lam, "gate": gate},
            cache_bounds=bounds,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            padding=padding,
            norm_weight=self._shared(self.subln.weight) if self.subln is not None else None,
            norm_eps=self.subln.eps if self.subln is not None else 0.0,
            out_scale=1.0 - self.lambda_init if self.subln is not None else 1.0,
        )
        return self.o_proj(out.flatten(2))

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"signal_heads={self.num_heads - self.num_noise_heads}, noise_heads={self.num_noise_heads}, "
            f"kv_heads={self.num_kv_heads}, gate={self.gate_proj is not None}, window_size={self.window_size}"
        )
