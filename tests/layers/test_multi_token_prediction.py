"""Multi-token prediction against its formula."""

import pytest
import torch

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import DifferentialAttentionV2, MultiTokenPrediction, PolyNormMLP, RotaryEmbedding

SIZE = 16


def layer():
    attention = DifferentialAttentionV2(SIZE, num_heads=4, num_kv_heads=2, head_dim=8, dtype=torch.float64)
    mlp = PolyNormMLP(SIZE, intermediate_size=24, dtype=torch.float64)
    module = MultiTokenPrediction(SIZE, attention=attention, mlp=mlp, norm_eps=1e-3, dtype=torch.float64)
    randomise(module)
    return module


def norm(x, module):
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-3) * module.weight


def test_it_is_the_formula_and_causal():
    module = layer()
    hidden, embedded = torch.randn(2, 2, 7, SIZE, dtype=torch.float64).unbind()
    positions = RotaryEmbedding(8)(torch.arange(7)[None])
    out = module(hidden, embedded, positions)
    x = torch.cat([hidden, norm(embedded, module.embed_norm)], dim=-1) @ module.input_proj.weight.T
    x = x + module.self_attn(norm(x, module.input_layernorm), positions)
    x = x + module.mlp(norm(x, module.post_attention_layernorm))
    assert_agrees(out, norm(x, module.final_layernorm), 1e-12)
    later = embedded.clone()
    later[:, 4:] += 1
    changed = module(hidden, later, positions)
    assert torch.equal(changed[:, :4], out[:, :4])
    assert (changed[:, 4:] - out[:, 4:]).abs().amax(-1).min() > 1e-3


def test_options_go_to_the_attention():
    module = layer()
    hidden, embedded = torch.randn(2, 1, 7, SIZE, dtype=torch.float64).unbind()
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = module(hidden, embedded, cu_seqlens=bounds, max_seqlen=4)
    assert_agrees(packed[:, 3:], module(hidden[:, 3:], embedded[:, 3:]), 1e-12)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"next_embeddings has shape \(1, 6, 16\) .*hidden_states \(1, 7, 16\)"):
        layer()(torch.zeros(1, 7, SIZE).double(), torch.zeros(1, 6, SIZE).double())
