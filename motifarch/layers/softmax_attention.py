"""Softmax attention with grouped queries: the baseline of the differential layers."""

from typing import Unpack

from motifarch.layers.base_attention import AttentionLayerOptions, BaseAttention


class SoftmaxAttention(BaseAttention):
    """Causal multi-head attention with num_heads queries over num_kv_heads keys and values of the
    same width.

    Args:
        hidden_size: E.
        num_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: key/value heads.
        head_dim: D.
        layer_idx: position in the model from 0: the cache's key.
        **options: of every attention layer
            (:class:`~motifarch.layers.base_attention.BaseAttention`): ``qk_norm``, ``qk_norm_eps``,
            ``window_size``, ``causal``, ``softmax_scale``, ``bias``, ``backend``, ``device`` and
            ``dtype``.

    Raises:
        ValueError: num_heads is not a multiple of num_kv_heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        **options: Unpack[AttentionLayerOptions],
    ) -> None:
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=0,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            **options,
        )

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, window_size={self.window_size}"
