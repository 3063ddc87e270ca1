"""PolyNorm as a module."""

import torch

from helpers.agreement import assert_agrees
from motifarch.layers import PolyNorm

ROWS = torch.tensor([[-1.5, -0.5, 0.0], [0.5, 1.0, 2.0]], dtype=torch.float64)
FIGURES = torch.tensor(
    [[-0.5263191243, -0.1043004407, 0.125], [0.3508009409, 0.6717202625, 1.7277992322]], dtype=torch.float64
)


def test_published_figures():
    module = PolyNorm(eps=1e-6, dtype=torch.float64)
    weight = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    module.load_state_dict({"weight": weight, "bias": torch.tensor([0.125])})
    assert_agrees(module(ROWS), FIGURES, 1e-10)
    assert_agrees(module.float()(ROWS.float()), FIGURES.float(), 1e-6)


def test_starts_at_a_third_each_and_no_bias():
    module = PolyNorm(dtype=torch.float64)
    assert torch.equal(module.weight.data, torch.full((3,), 1 / 3, dtype=torch.float64))
    assert torch.equal(module.bias.data, torch.zeros(1, dtype=torch.float64))
    terms = [x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) for x in (ROWS**3, ROWS**2, ROWS)]
    assert_agrees(module(ROWS), sum(terms) / 3, 1e-12)


def test_the_options_are_those_of_the_models_with_experts():
    module = PolyNorm(sigmoid_weight=True, output_scale=0.5, bias_clamp=0.5, hidden_clamp=1.8, dtype=torch.float64)
    weight = torch.tensor([0.2, -0.3, 0.5], dtype=torch.float64)
    module.load_state_dict({"weight": weight, "bias": torch.tensor([0.9], dtype=torch.float64)})
    x = ROWS.clamp(-1.8, 1.8)
    terms = [z / torch.sqrt((z * z).mean(-1, keepdim=True) + 1e-6) for z in (x**3, x**2, x)]
    s = 1 / (1 + torch.exp(-weight))
    expected = 0.5 * (s[0] * terms[0] + s[1] * terms[1] + s[2] * terms[2] + 0.5)  # a bias of 0.9 counts as 0.5
    assert_agrees(module(ROWS), expected, 1e-12)
    up = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64).expand(2, 3)
    out = module(ROWS, up)
    assert_agrees(out, expected * up.clamp(-1.8, 1.8), 1e-12)
    out.sum().backward()
    assert module.bias.grad.item() == 0  # as torch.clamp's outside its bounds
    assert "sigmoid_weight=True, output_scale=0.5, bias_clamp=0.5, hidden_clamp=1.8" in repr(module)
