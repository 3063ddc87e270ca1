"""Grouped-query attention for multi-head latent attention, whose keys noise can't share."""

from typing import Any

import torch
from torch import Tensor, nn

from motifarch.integrations.grouped_query import GroupedQueryAttention
from motifarch.layers import apply_rotary


class FromLatentAttention(GroupedQueryAttention):
    """Mixed into a host's latent attention module that has been given plain projections.

    Heads are as wide as the host's values, so that its o_proj stays; their last
    ``qk_rope_head_dim`` numbers are rotated, as in the host.
    """

    projections = ("q_proj", "k_proj", "v_proj")
    output = "o_proj"

    def rotated(self, q: Tensor, k: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, S, heads, D)."""
        width = position_embeddings[0].shape[-1]

        def turned(x: Tensor) -> Tensor:
            still, turning = x.split([self.head_dim - width, width], dim=-1)
            return torch.cat((still, apply_rotary(turning, position_embeddings)), dim=-1)

        return turned(q), turned(k)


def replace_latents(module: Any, *, kv_heads: int) -> list[str]:
    """Give a latent attention module new projections for all that it has but ``o_proj``; returns
    the names of what goes with the latents.
    """
    out, latents = module.o_proj, module.kv_a_proj_with_mqa
    new = {"bias": latents.bias is not None, "device": out.weight.device, "dtype": out.weight.dtype}
    # Its own extra factor (YaRN's) stays on the logits, whose width changes.
    module.scaling *= (module.qk_head_dim / module.v_head_dim) ** 0.5
    module.head_dim = module.v_head_dim
    module.num_key_value_groups = module.num_heads // kv_heads
    lost = [name for name, _ in module.named_children() if name != "o_proj"]
    for name in ("q_proj", *lost):  # a host may have q_proj, or None there
        if hasattr(module, name):
            delattr(module, name)
    for name, heads in (("q_proj", module.num_heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        projection = nn.Linear(latents.in_features, heads * module.head_dim, **new)
        nn.init.normal_(projection.weight, std=module.config.initializer_range)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        setattr(module, name, projection)
    return lost
