"""The baseline against transformers' Llama attention."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import SoftmaxAttention


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_agrees_with_llama(kv_heads, backend):
    config = LlamaConfig(
        hidden_size=24, num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=8, attn_implementation="eager"
    )
    theirs = LlamaAttention(config, layer_idx=0)
    randomise(theirs)
    ours = SoftmaxAttention(24, num_heads=4, num_kv_heads=kv_heads, head_dim=8, layer_idx=0, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x1 = torch.randn(2, 13, 24, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    tables = LlamaRotaryEmbedding(config)(x1, torch.arange(13)[None])
    out1 = ours(x1, tables)
    out2 = theirs(x2, tables, torch.full((13, 13), -torch.inf).triu(1)[None, None])[0]
    assert_agrees(out1, out2)
    grad = torch.randn(out1.shape)
    first = torch.autograd.grad(out1, [x1, *ours.parameters()], grad)
    for a, b in zip(first, torch.autograd.grad(out2, [x2, *theirs.parameters()], grad), strict=True):
        assert_agrees(a, b)


def test_bad_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        SoftmaxAttention(24, num_heads=4, num_kv_heads=3, head_dim=8, layer_idx=0)
