"""Loads of experts are balanced without a loss: a bias on each expert's score, for selection only,
rises where an expert got fewer tokens than the mean, and falls where it got more.

Source: DeepSeek-AI, DeepSeek-V3, arXiv 2412.19437, section 2.1.2; that a step is made free of its
mean, so that biases do not drift together, is torchtitan's.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def update_expert_biases(
    experts: Iterable[nn.Module],
    *,
    rate: float,
    skip: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> list[torch.Tensor]:
    """Moves each layer's biases by ``rate`` towards equal loads and zeroes its counts, in place and
    on the device.

    With load the tokens that each expert got since the last call, over all ranks, a bias moves by
    ``rate * sign(mean(load) - load)``, less the mean of these. Only the order of loads counts, so
    that tokens may be counted several times where that is done for all of them alike: by
    recomputation, or by the ranks of tensor parallelism.

    All ranks call this together, with their layers in the same order, once an optimizer step:
    before or after it, for neither reads what the other writes. One all-reduce serves all layers.

    Args:
        experts: modules with buffers ``expert_bias`` (E,), float32, and ``tokens_per_expert`` (E,),
            such as a model's MixtureOfExperts layers.
        rate: what a bias moves by.
        skip: a scalar on the device, as `step_if_finite` returns it; where it is not 0, biases stay
            bitwise as they were. Counts are zeroed all the same.
        group: the ranks whose tokens count together; by default all.

    Returns:
        Each layer's load, (E,) float64.

    Raises:
        ValueError: rate is negative or not finite.
    """
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate is {rate}; it must be at least 0 and finite")
    layers: list[nn.Module] = list(experts)
    if not layers:
        return []
    counts: list[torch.Tensor] = [layer.get_buffer("tokens_per_expert") for layer in layers]
    # Sums that float32 would round could make equal loads differ from their mean.
    total = torch.cat(counts).double()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    loads = total.split([len(c) for c in counts])
    for layer, load, count in zip(layers, loads, counts, strict=True):
        bias = layer.get_buffer("expert_bias")
        step = rate * torch.sign(load.mean() - load)
        moved = bias + (step - step.mean()).to(bias.dtype)
        bias.copy_(moved if skip is None else torch.where(skip != 0, bias, moved))
        count.zero_()
    return list(loads)
