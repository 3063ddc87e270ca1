"""Biases of experts: moved by hand, left where nothing is to be balanced, the same on all ranks."""

import pytest
import torch
from torch import nn

from helpers.distributed import on_ranks
from motifarch.layers import MixtureOfExperts
from motifarch.optim import update_expert_biases
from motifarch.parallel import open_world


class Experts(nn.Module):
    """The two buffers of a layer with experts."""

    def __init__(self, counts: list[float], biases: list[float] | None = None) -> None:
        super().__init__()
        self.register_buffer("tokens_per_expert", torch.tensor(counts, dtype=torch.float32))
        self.register_buffer("expert_bias", torch.tensor(biases or [0.0] * len(counts)))


def test_by_hand() -> None:
    # Mean loads of 4 and 6: steps of +, +, -, 0 and +, +, -, less a quarter and a third.
    layers = [Experts([1, 3, 8, 4], [1.0, 0.0, 0.0, -1.0]), Experts([0, 0, 18])]
    update_expert_biases(layers, rate=0.12)
    torch.testing.assert_close(layers[0].expert_bias, torch.tensor([1.09, 0.09, -0.15, -1.03]))
    torch.testing.assert_close(layers[1].expert_bias, torch.tensor([0.08, 0.08, -0.16]))
    assert not any(layer.tokens_per_expert.any() for layer in layers)
    update_expert_biases([], rate=0.1)


@pytest.mark.parametrize("count", [0.0, 1.0, 16777215.0])
def test_equal_loads_change_nothing(count: float) -> None:
    layer = Experts([count] * 7, [0.1 * i for i in range(7)])
    before = layer.expert_bias.clone()
    update_expert_biases([layer], rate=0.1)
    assert torch.equal(layer.expert_bias, before)


def test_a_skipped_step_zeroes_counts_alone() -> None:
    layer = Experts([1, 2, 3], [0.1, 0.2, 0.3])
    before = layer.expert_bias.clone()
    update_expert_biases([layer], rate=0.1, skip=torch.tensor(1.0))
    assert torch.equal(layer.expert_bias, before)
    assert not layer.tokens_per_expert.any()
    layer.tokens_per_expert += torch.tensor([1.0, 2.0, 3.0])
    update_expert_biases([layer], rate=0.1, skip=torch.tensor(0.0))
    assert not torch.equal(layer.expert_bias, before)


def test_a_layer_is_balanced_and_its_biases_do_not_drift() -> None:
    torch.manual_seed(0)
    layer = MixtureOfExperts(8, num_experts=8, top_k=2, intermediate_size=2, num_shared_experts=0)
    hidden = torch.randn(1, 512, 8) + torch.randn(8)
    loads = []
    for _ in range(200):
        layer(hidden)
        loads.append(layer.tokens_per_expert / layer.tokens_per_expert.mean())
        update_expert_biases([layer], rate=5e-3)
    assert loads[0].max() > 1.5
    assert loads[0].min() < 0.5
    assert loads[-1].max() < 1.2
    assert loads[-1].min() > 0.8
    assert abs(layer.expert_bias.double().sum()) < 1e-5


@pytest.mark.parametrize("rate", [-0.1, float("nan"), float("inf")])
def test_an_impossible_rate(rate: float) -> None:
    with pytest.raises(ValueError, match=f"rate is {rate}"):
        update_expert_biases([Experts([1, 2])], rate=rate)


def count_on_ranks() -> None:
    """Loads that rank by rank are those of other experts than together."""
    with open_world() as world:
        layers = [Experts([[9, 1, 0], [0, 1, 7]][world.rank]), Experts([[5, 3], [1, 3]][world.rank])]
        update_expert_biases(layers, rate=0.3)
        torch.testing.assert_close(layers[0].expert_bias, torch.tensor([-0.2, 0.4, -0.2]))
        assert not layers[1].expert_bias.any()
        alone = Experts([9, 1, 0])
        update_expert_biases([alone], rate=0.3, group=world_of_one(world.rank))
        torch.testing.assert_close(alone.expert_bias, torch.tensor([-0.4, 0.2, 0.2]))


def world_of_one(rank: int) -> torch.distributed.ProcessGroup:
    """A group of this rank alone."""
    return [torch.distributed.new_group([r]) for r in range(2)][rank]


def test_ranks_count_together() -> None:
    on_ranks(2, count_on_ranks)
