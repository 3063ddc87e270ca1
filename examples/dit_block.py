"""Grouped differential attention in a diffusers transformer, DiT (`pip install diffusers`).

    python examples/dit_block.py FOLDER

The model's heads stay as they are and gain noise heads; it starts as the same function. It learns
the velocity from noise to blank images of one of four shades, is saved in FOLDER and loaded.
"""

import sys

import torch
from diffusers import DiTTransformer2DModel

from motifarch.integrations.diffusers import load_patched, patch

torch.manual_seed(0)
sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "sample_size": 8}
model = DiTTransformer2DModel(**sizes, in_channels=1, norm_num_groups=1, num_embeds_ada_norm=4)


def velocity(model: DiTTransformer2DModel, images: torch.Tensor, time: torch.Tensor, shade: torch.Tensor):
    """(B, 1, 8, 8), of images at times 0 (noise) to 1."""
    return model(images, timestep=(time * 1000).long(), class_labels=shade).sample


def batch(size: int) -> tuple[torch.Tensor, ...]:
    """Noisy images, their times and shades, and the velocity that leads to the shade."""
    shade, time = torch.randint(4, (size,)), torch.rand(size)
    noise, image = torch.randn(size, 1, 8, 8), (shade / 2 - 0.75)[:, None, None, None].expand(-1, 1, 8, 8)
    weight = time[:, None, None, None]
    return (1 - weight) * noise + weight * image, time, shade, image - noise


inputs = batch(4)[:3]
before = velocity(model.eval(), *inputs)
print("patched:", ", ".join(patch(model, ratio=2)))
print(f"outputs moved by {(velocity(model, *inputs) - before).abs().max().item():.1e}")

optimizer = torch.optim.AdamW(model.train().parameters(), lr=2e-3)
for step in range(61):
    *noisy, target = batch(32)
    loss = (velocity(model, *noisy) - target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2d}  loss {loss.item():.3f}")

model.eval().save_pretrained(sys.argv[1])
loaded = load_patched(DiTTransformer2DModel, sys.argv[1])
print(f"loaded: differs by {(velocity(loaded, *inputs) - velocity(model, *inputs)).abs().max().item():.1e}")
