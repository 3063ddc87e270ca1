"""The feed-forward blocks against their formulas."""

import pytest
import torch

from helpers.agreement import assert_agrees, randomise
from motifarch.layers import PolyNormMLP, SwiGLUMLP


def poly_norm(z, weight, bias, eps):
    terms = [t / torch.sqrt(t.square().mean(-1, keepdim=True) + eps) for t in (z**3, z**2, z)]
    return sum(w * t for w, t in zip(weight, terms, strict=True)) + bias


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_poly_norm_block_is_the_formula(eps):
    block = PolyNormMLP(8, intermediate_size=24, eps=eps, dtype=torch.float64)
    randomise(block, std=0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    gate, up = x @ block.gate_proj.weight.T, x @ block.up_proj.weight.T
    plain = (poly_norm(gate, block.act_fn.weight, block.act_fn.bias, eps) * up) @ block.down_proj.weight.T
    out = block(x)
    assert_agrees(out, plain, 1e-12)
    grad = torch.randn_like(out)
    leaves = [x, *block.parameters()]
    for a, b in zip(torch.autograd.grad(out, leaves, grad), torch.autograd.grad(plain, leaves, grad), strict=True):
        assert_agrees(a, b, 1e-10)


def test_the_activations_options_reach_it():
    block = PolyNormMLP(8, intermediate_size=24, sigmoid_weight=True, output_scale=0.5, dtype=torch.float64)
    randomise(block, std=0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gate, up = x @ block.gate_proj.weight.T, x @ block.up_proj.weight.T
    act = poly_norm(gate, torch.sigmoid(block.act_fn.weight), block.act_fn.bias, 1e-6)
    assert_agrees(block(x), (0.5 * act * up) @ block.down_proj.weight.T, 1e-12)


def test_swiglu_block_is_the_formula():
    block = SwiGLUMLP(8, intermediate_size=24, dtype=torch.float64, bias=True)
    randomise(block, std=0.5)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    gate = x @ block.gate_proj.weight.T + block.gate_proj.bias
    up = x @ block.up_proj.weight.T + block.up_proj.bias
    plain = (gate / (1 + torch.exp(-gate)) * up) @ block.down_proj.weight.T + block.down_proj.bias
    assert_agrees(block(x), plain, 1e-12)


def test_parameter_names_are_the_released_models_():
    assert {n: tuple(p.shape) for n, p in PolyNormMLP(8, intermediate_size=24).named_parameters()} == {
        "gate_proj.weight": (24, 8),
        "up_proj.weight": (24, 8),
        "down_proj.weight": (8, 24),
        "act_fn.weight": (3,),
        "act_fn.bias": (1,),
    }
