"""Clipping, and steps that are skipped on the device."""

import copy
import math

import pytest
import torch
from torch import nn

from motifarch.optim import build_adamw, clip_gradients, step_if_finite


def test_clipping() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    assert clip_gradients(parameters, None).item() == pytest.approx(13.0)
    assert parameters[1].grad.item() == 12.0
    assert clip_gradients(parameters, 1.3).item() == pytest.approx(13.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.3, 0.4]))
    assert clip_gradients(parameters, 5.0).item() == pytest.approx(1.3)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([1.2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 3)
    optimizer = build_adamw(linear, lr=0.1)

    def step(value: float) -> torch.Tensor:
        linear(torch.randn(5, 4)).square().sum().backward()
        assert linear.weight.grad is not None
        linear.weight.grad[0, 0] += value
        norm = clip_gradients(linear.parameters(), 1.0)
        skipped = step_if_finite(optimizer, torch.tensor(1.0), norm)
        optimizer.zero_grad()
        return skipped

    assert step(0.0).item() == 0
    weights, moments = copy.deepcopy(linear.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    assert step(bad).item() == 1
    for name, value in linear.state_dict().items():
        assert torch.equal(value, weights[name])
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(value, moments[index][name]), name
    assert step(0.0).item() == 0
    assert not torch.equal(linear.weight, weights["weight"])


@pytest.mark.parametrize(("loss", "skip"), [(math.nan, 0.0), (1.0, 1.0)])
def test_the_loss_counts_too_and_so_does_another_reason(loss: float, skip: float) -> None:
    linear = nn.Linear(2, 2)
    optimizer = build_adamw(linear, lr=0.1)
    linear(torch.ones(1, 2)).sum().backward()
    before = linear.weight.detach().clone()
    assert step_if_finite(optimizer, torch.tensor(loss), torch.tensor(1.0), skip=torch.tensor(skip)).item() == 1
    assert torch.equal(linear.weight, before)


def test_an_optimizer_that_cannot_skip_is_refused() -> None:
    optimizer = torch.optim.AdamW(nn.Linear(2, 2).parameters(), fused=False)
    with pytest.raises(ValueError, match="fused=True"):
        step_if_finite(optimizer, torch.tensor(1.0))
