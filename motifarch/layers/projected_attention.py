"""Attention whose queries, keys and values are each one projection of the tokens: the base of all
layers but the latent ones.

Shapes: B batch, S tokens, E hidden size, H heads, D head_dim of queries and keys, Dv of values.
"""

from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motifarch.layers.base_attention import BaseAttention, Heads
from motifarch.layers.head_norm import HeadNorm
from motifarch.layers.rotary import PositionEmbeddings, rotate_heads


class AttentionLayerOptions(TypedDict, total=False):
    """Keyword arguments of every layer with one projection each, which :class:`ProjectedAttention`
    describes.
    """

    qk_norm: bool
    qk_norm_eps: float
    window_size: tuple[int, int]
    causal: bool
    softmax_scale: float | None
    bias: bool
    dropout: float
    context_dim: int | None
    backend: str
    device: torch.device | str | None
    dtype: torch.dtype | None


class ProjectedAttention(BaseAttention):
    """Queries, keys and values by a linear layer each, and a fourth for the output.

    A subclass gives lambda and a gate (:meth:`_gate`).

    Args:
        hidden_size: E.
        num_heads: signal and noise heads together.
        num_noise_heads: noise heads, 0 for softmax attention.
        num_kv_heads: key/value heads, before pairing.
        head_dim: D.
        layer_idx: position in the model from 0.
        paired_kv: key heads come in pairs, one for signal and one for noise, with values of double
            width.
        qk_norm: RMS-normalise each query and key head before the rotation.
        qk_norm_eps: its epsilon.
        bias: biases in the four projections.
        context_dim: width of the context's tokens; default hidden_size.
        device: where the parameters are made.
        dtype: their dtype.
        **options: of every attention layer, as BaseAttention describes them.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_noise_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int | None,
        paired_kv: bool = False,
        qk_norm: bool = False,
        qk_norm_eps: float = 1e-6,
        bias: bool = False,
        context_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            num_heads=num_heads,
            num_noise_heads=num_noise_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=2 * head_dim if paired_kv else head_dim,
            layer_idx=layer_idx,
            paired_kv=paired_kv,
            **options,
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        context_dim = hidden_size if context_dim is None else context_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias, **factory)
        self.k_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias, **factory)
        self.v_proj = nn.Linear(context_dim, num_kv_heads * head_dim, bias=bias, **factory)
        out_features = (num_heads - num_noise_heads) * self.v_head_dim
        self.o_proj = nn.Linear(out_features, hidden_size, bias=bias, **factory)
        self.q_norm = HeadNorm(head_dim, eps=qk_norm_eps, **factory) if qk_norm else None
        self.k_norm = HeadNorm(head_dim, eps=qk_norm_eps, **factory) if qk_norm else None

    def share_heads(self, group: ProcessGroup) -> None:
        """As BaseAttention has it; norms are shared by all heads."""
        super().share_heads(group)
        for norm in (self.q_norm, self.k_norm, self.subln):
            if norm is not None:
                norm.group = group

    def _gate(self, hidden_states: Tensor) -> Tensor | None:
        """What the output is gated with, (B, S, Hs, Dv), or None."""
        return None

    def _project(
        self, hidden_states: Tensor, position_embeddings: PositionEmbeddings | None, context: Tensor | None
    ) -> Heads:
        # Of a pair, the cache holds k1 and k2 side by side.
        # A view takes a fifth of unflatten's time, which counts where one token is decoded.
        context = hidden_states if context is None else context
        heads = (*context.shape[:-1], -1)
        q = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim)
        k = self.k_proj(context).view(*heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            q, k = rotate_heads(q, k, position_embeddings)
        value = self.v_proj(context).view(*heads, self.v_head_dim)
        key = k.reshape(*heads, self.v_head_dim) if self.paired_kv else k
        return Heads(q, key, value, self._gate(hidden_states))

    def _output(self, attended: Tensor, heads: Heads) -> Tensor:
        out: Tensor = self.o_proj(attended.flatten(2))
        return out
