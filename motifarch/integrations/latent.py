"""Grouped-query attention for multi-head latent attention, whose keys noise can't share."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motifarch.layers import apply_rotary

LOST = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj")
"""What goes with the latents."""


class GroupedQueryAttention:
    """Mixed into a host's latent attention module that has been given plain projections.

    Heads are as wide as the host's values, so that its o_proj stays; their last
    ``qk_rope_head_dim`` numbers are rotated, as in the host.
    """

    config: Any
    layer_idx: int
    head_dim: int
    scaling: float
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As transformers' attention modules: (B, S, E) -> (B, S, E)."""
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self._rotated(q, position_embeddings), self._rotated(k, position_embeddings)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, maps = attend(self, q, k, v, attention_mask, scaling=self.scaling, **options)
        return self.o_proj(out.flatten(2)), maps

    def _rotated(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        width = position_embeddings[0].shape[-1]
        still, turning = x.split([self.head_dim - width, width], dim=-1)
        return torch.cat((still, apply_rotary(turning, position_embeddings)), dim=-1)


def replace_latents(module: Any, *, kv_heads: int) -> None:
    """Give a latent attention module new projections for what :data:`LOST` names."""
    out = module.o_proj
    new = {"bias": module.q_a_proj.bias is not None, "device": out.weight.device, "dtype": out.weight.dtype}
    # Its own extra factor (YaRN's) stays on the logits, whose width changes.
    module.scaling *= (module.qk_head_dim / module.v_head_dim) ** 0.5
    module.head_dim = module.v_head_dim
    module.num_key_value_groups = module.num_heads // kv_heads
    for name in LOST:
        delattr(module, name)
    for name, heads in (("q_proj", module.num_heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        projection = nn.Linear(module.hidden_size, heads * module.head_dim, **new)
        nn.init.normal_(projection.weight, std=module.config.initializer_range)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        setattr(module, name, projection)
