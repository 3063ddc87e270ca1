"""Softmax attention with grouped queries: the baseline of the differential layers."""

from typing import Unpack

from motifarch.layers.head_counts import default_head_dim
from motifarch.layers.projected_attention import AttentionLayerOptions, ProjectedAttention


class SoftmaxAttention(ProjectedAttention):
    """Causal multi-head attention with num_heads queries over num_kv_heads keys and values of the
    same width.

    Args:
        hidden_size: E.
        num_heads: query heads, a multiple of num_kv_heads.
        num_kv_heads: key/value heads; default num_heads.
        head_dim: D; default hidden_size divided by num_heads.
        layer_idx: position in the model from 0: the key in a cache, which a layer without one does
            not take.
        **options: of every attention layer
            (:class:`~motifarch.layers.projected_attention.ProjectedAttention`): ``qk_norm``,
            ``qk_norm_eps``, ``window_size``, ``causal``, ``softmax_scale``, ``bias``, ``dropout``,
            ``context_dim``, ``backend``, ``device`` and ``dtype``.

    Raises:
        ValueError: num_heads is not a multiple of num_kv_heads.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int | None = None,
        **options: Unpack[AttentionLayerOptions],
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=0,
            num_kv_heads=num_kv_heads,
            head_dim=default_head_dim(hidden_size, num_heads) if head_dim is None else head_dim,
            layer_idx=layer_idx,
            **options,
        )

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, window_size={self.window_size}"
