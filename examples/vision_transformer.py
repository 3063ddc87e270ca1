"""Grouped differential attention in a timm vision transformer (`pip install timm`).

    python examples/vision_transformer.py

An encoder's attention is a layer with `causal=False`. It trains here on a made-up task: which of
the three colours is brightest.
"""

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from motifarch.layers import GroupedDifferentialAttention


class Attention(GroupedDifferentialAttention):
    """timm's signature; four signal heads share a noise head and a key/value head."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = False, **_: object) -> None:
        groups = num_heads // 4
        super().__init__(
            dim,
            num_heads=num_heads + groups,
            num_noise_heads=groups,
            num_kv_heads=groups,
            head_dim=dim // num_heads,
            layer_idx=0,
            paired_kv=False,
            bias=qkv_bias,
            causal=False,
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Maps patches (B, N, dim) to the same."""
        return super().forward(x)


torch.manual_seed(0)
model = VisionTransformer(
    img_size=32, patch_size=8, num_classes=3, embed_dim=64, depth=2, num_heads=8, attn_layer=Attention
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for step in range(41):
    colours = torch.randint(3, (32,))
    brightness = torch.nn.functional.one_hot(colours, 3).float()
    images = torch.randn(32, 3, 32, 32) + brightness[:, :, None, None]
    loss = torch.nn.functional.cross_entropy(model(images), colours)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f} nats")
