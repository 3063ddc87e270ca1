"""Layers that are not causal compute the formula."""

import torch

from helpers.plain_attention import plain_diff_attention
from motifarch.layers import GroupedDifferentialAttention


def test_a_layer_that_is_not_causal_is_the_formula() -> None:
    heads = {"num_heads": 3, "num_noise_heads": 1, "num_kv_heads": 1, "head_dim": 8, "paired_kv": False}
    layer = GroupedDifferentialAttention(16, **heads, layer_idx=1, causal=False, dtype=torch.float64)
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (p(x).unflatten(-1, (-1, 8)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
        options = {"norm_weight": layer.subln.weight, "out_scale": 1 - layer.lambda_init}
        lam = layer.compute_lambda()
        expected = plain_diff_attention(q[:, :, :2], k, q[:, :, 2:], k, v, lam, causal=False, **options)
        torch.testing.assert_close(layer(x), layer.o_proj(expected.flatten(2)), atol=1e-12, rtol=1e-12)
