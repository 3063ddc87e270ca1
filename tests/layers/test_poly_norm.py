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
