"""Grouped differential attention in a timm vision transformer (`pip install timm`).

    python examples/vision_transformer.py

timm's heads are the signal heads; each four of them share a noise head here. It trains on a made-up
task: which of the three colours is brightest.
"""

import torch
from timm.models.vision_transformer import VisionTransformer

from motifarch.integrations.timm import Attention


class Ratio4(Attention):
    """Four signal heads a noise head; timm hands a class over, not its options."""

    ratio = 4


torch.manual_seed(0)
model = VisionTransformer(
    img_size=32, patch_size=8, num_classes=3, embed_dim=64, depth=2, num_heads=8, attn_layer=Ratio4
)
print(model.blocks[0].attn)
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
