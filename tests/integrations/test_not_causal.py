"""Layers that are not causal: docs/patching.md's vision transformer trains, the formula holds."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from helpers.plain_attention import plain_diff_attention
from helpers.python_process import run_python
from motifarch.layers import GroupedDifferentialAttention

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "patching.md").read_text(encoding="utf-8")
(VIT,) = re.findall(r"^```python\n(from timm.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

TRAIN = """
import torch

torch.manual_seed(0)
images, labels = torch.randn(12, 3, 32, 32), torch.randint(0, 10, (12,))
optimizer = torch.optim.AdamW(vit.parameters(), lr=2e-3)
losses = []
for _ in range(25):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(vit(images), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0] / 2, losses
assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vit.parameters())
images.requires_grad_()
first = vit.blocks[0](vit.patch_embed(images))[:, 0]  # the first patch alone, past one layer
first.sum().backward()
assert images.grad[:, :, -8:, -8:].abs().min() > 0  # sees the last
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_the_vision_transformer_trains() -> None:
    before = (
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}]\n"
        "from helpers.timm_models import make_timm_importable\nmake_timm_importable()\n"
    )
    run_python(before + VIT + TRAIN)


def test_a_layer_that_is_not_causal_is_the_formula() -> None:
    layer = GroupedDifferentialAttention(
        16,
        num_heads=3,
        num_noise_heads=1,
        num_kv_heads=1,
        head_dim=8,
        layer_idx=1,
        paired_kv=False,
        causal=False,
        dtype=torch.float64,
    )
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        expected = plain_diff_attention(
            q[:, :, :2],
            k,
            q[:, :, 2:],
            k,
            v,
            layer.compute_lambda(),
            causal=False,
            norm_weight=layer.subln.weight,
            out_scale=1 - layer.lambda_init,
        )
        torch.testing.assert_close(layer(x), layer.o_proj(expected.flatten(2)), atol=1e-12, rtol=1e-12)
