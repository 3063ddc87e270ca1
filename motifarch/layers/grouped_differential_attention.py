"""Grouped differential attention (GDA, arXiv 2510.06949) and its 1:1 case, DIFF V1
(arXiv 2410.05258).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from motif_kernels import diff_attn_func, diff_attn_varlen_func, diff_attn_with_kvcache
from motifarch.layers.base_attention import BaseAttention, check_heads
from motifarch.layers.cache import CachePosition
from motifarch.layers.padding import PaddingMask
from motifarch.layers.rotary import PositionEmbeddings


def default_lambda_init(depth: float) -> float:
    """``0.8 - 0.6 exp(-0.3 depth)``, depth counted from 0 (arXiv 2410.05258, section 3.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def scalar_lambda(layer: Any) -> Tensor:
    """``exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``
    (arXiv 2410.05258, equation 2).

    Args:
        layer: has the four vectors (D,) and the number lambda_init.

    Returns:
        A scalar tensor, float32 (float64 for float64 vectors).
    """
    dtype = torch.promote_types(layer.lambda_q1.dtype, torch.float32)
    q1, k1, q2, k2 = (v.to(dtype) for v in (layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2))
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + layer.lambda_init


class GroupedDifferentialAttention(BaseAttention):
    """Differential attention in which a group of signal heads shares one noise head.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head]; key heads as
    pairs (signal, noise); value heads as pairs joined to a width of ``Dv = 2 * head_dim``. Every
    signal head gives Dv numbers, so that o_proj reads ``(num_heads - num_noise_heads) * 2 *
    head_dim``. Parameter names are those of the released Motif-2 models.

    With ``paired_kv=False`` keys and values are ordinary heads of width ``Dv = head_dim``, one key
    for signal and noise alike: the key/value heads, the cache and o_proj's inputs are then those of
    softmax attention with the signal heads.

    The output is ``(1 - lambda_init) * RMSNorm(A1 V - lambda A2 V)`` with one scalar
    ``lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init`` a layer.

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together: 40 in Motif-2-12.7B.
        num_noise_heads: noise heads: 8 there, for groups of 4 signal heads.
        num_kv_heads: key/value heads before pairing, even; half of it must divide num_noise_heads.
            Without pairs: key/value heads, which must divide num_noise_heads.
        head_dim: d, width of a query/key head.
        layer_idx: position in the model from 0: the cache's key, and lambda_init's depth.
        paired_kv: keys in pairs (signal, noise) and values of double width, or ordinary key/value
            heads.
        lambda_init: the constant; default :func:`default_lambda_init` of layer_idx. (The released
            Motif checkpoints count depth from -1; their model class passes its own value.)
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``; without it the
            difference is used as it is.
        norm_eps: the sub-norm's epsilon.
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
        ValueError: heads that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_noise_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        paired_kv: bool = True,
        lambda_init: float | None = None,
        sub_norm: bool = True,
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
        check_heads(num_heads, num_noise_heads, num_kv_heads, paired_keys=paired_kv)
        value_width = 2 * head_dim if paired_kv else head_dim
        super().__init__(
            hidden_size,
            query_width=num_heads * head_dim,
            key_width=num_kv_heads * head_dim,
            value_width=num_kv_heads * head_dim,
            out_width=(num_heads - num_noise_heads) * value_width,
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
        self.num_heads, self.num_noise_heads, self.num_kv_heads = num_heads, num_noise_heads, num_kv_heads
        self.paired_kv, self.v_head_dim = paired_kv, value_width
        self.lambda_init = default_lambda_init(layer_idx) if lambda_init is None else lambda_init
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.subln = nn.RMSNorm(value_width, eps=norm_eps, device=device, dtype=dtype) if sub_norm else None
        self.last_lambda: Tensor | None = None
        self.reset_lambda()

    def reset_lambda(self) -> None:
        """Draw the four lambda vectors from N(0, 0.1), as the paper's code does."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def compute_lambda(self) -> Tensor:
        """The layer's lambda: a float32 (float64) scalar tensor."""
        return scalar_lambda(self)

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
            past_key_values: a transformers Cache: keys are kept as heads of k1 and k2 side by side,
                of width 2 * head_dim, and values as heads of the same width; without pairs, both as
                num_kv_heads heads of head_dim.
            padding: which tokens of a padded batch are real, cached ones included.
            cache_position: where past_key_values stands before this call; by default it is asked.
                With tokens padded on the left in the cache, it says how many.

        Returns:
            Tensor (B, S, E).

        Raises:
            ValueError: gradients are wanted through a cache that is written in place, or arguments
                do not fit.
        """
        q, k = self._queries_and_keys(hidden_states, position_embeddings)
        group = self.num_heads // self.num_noise_heads - 1
        q = q.unflatten(2, (-1, group + 1))  # all noise heads, or those of this rank
        key = k.flatten(2).unflatten(-1, (-1, self.v_head_dim))  # of a pair, k1 and k2 side by side
        value = self.v_proj(hidden_states).unflatten(-1, (-1, self.v_head_dim))
        key, value, bounds = self._append(
            key, value, past_key_values, cache_position, needs_full_cache=padding is not None
        )
        lam = self._shared(self.compute_lambda())
        self.last_lambda = lam.detach()
        k1, k2 = key.chunk(2, dim=-1) if self.paired_kv else (key, key)
        out = self._attend(
            diff_attn_func,
            diff_attn_varlen_func,
            diff_attn_with_kvcache,
            queries={"q1": q[..., :group, :].flatten(2, 3), "q2": q[..., group, :]},
            keys={"k1": k1, "k2": k2, "v": value},
            lam=lam,
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
            f"kv_heads={self.num_kv_heads}, paired_kv={self.paired_kv}, lambda_init={self.lambda_init:.4f}, "
            f"window_size={self.window_size}"
        )


class DifferentialAttention(GroupedDifferentialAttention):
    """DIFF V1 (arXiv 2410.05258): as many noise heads as signal heads, in adjacent pairs
    (signal, noise).

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together, even.
        num_kv_heads: key/value heads before pairing, even.
        head_dim: d; values have 2D.
        layer_idx: position in the model, from 0.
        **options: those of GroupedDifferentialAttention, but num_noise_heads.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, num_kv_heads: int, head_dim: int, layer_idx: int, **options: Any
    ) -> None:
        if num_heads % 2:
            raise ValueError(
                f"num_heads={num_heads} must be even: heads come in pairs, one for signal and one for noise"
            )
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=num_heads // 2,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            **options,
        )
