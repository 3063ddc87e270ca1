"""Grouped-query attention for modules of transformers whose own forward cannot serve noise heads:
one projection gives their queries, keys and values, or they hand no keyword arguments on.
"""

from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motifarch.integrations.derived import beside, linear_of
from motifarch.integrations.layouts import AttentionLayout, head_counts, head_dim, output_name


class GroupedQueryAttention:
    """Mixed into a host's attention module that has three plain projections."""

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    projections: tuple[str, str, str]
    output: str

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' attention modules: (B, S, E) -> (B, S, E)."""
        q, k, v = (getattr(self, name)(hidden_states).unflatten(-1, (-1, self.head_dim)) for name in self.projections)
        if position_embeddings is not None:
            q, k = self.rotated(q, k, position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        window = getattr(self, "sliding_window", getattr(self.config, "sliding_window", None))
        out, maps = attend(self, q, k, v, attention_mask, scaling=self.scaling, sliding_window=window, **options)
        return getattr(self, self.output)(out.flatten(2)), maps

    def rotated(self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, S, heads, D), rotated by the host's own function."""
        rotate = beside(self, "apply_rotary_pos_emb")  # type: ignore[arg-type]
        return rotate(q, k, *position_embeddings, unsqueeze_dim=2)  # type: ignore[no-any-return]


def plain_projections(module: Any, layout: AttentionLayout) -> None:
    """Give a module of :class:`GroupedQueryAttention` what it needs, its one projection split."""
    width, (heads, kv_heads) = head_dim(module), head_counts(module)
    if layout.fused:
        (name,) = layout.projections
        fused, first, second = getattr(module, name), heads * width, (heads + kv_heads) * width
        delattr(module, name)
        bounds = ((0, first), (first, second), (second, fused.out_features))
        for split, (begin, end) in zip(layout.split, bounds, strict=True):
            setattr(module, split, linear_of(fused, lambda t, b=begin, e=end: t.detach()[b:e].clone()))
    module.projections, module.output, module.head_dim = layout.split, output_name(module), width
    if not hasattr(module, "scaling"):
        module.scaling = getattr(module, "scale", width**-0.5)
