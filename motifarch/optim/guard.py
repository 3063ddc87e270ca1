"""Gradient clipping and the skipping of non-finite steps, without waiting for the device."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scales gradients so that their global norm is at most max_norm.

    Args:
        parameters: Parameters, which may be sharded DTensors; the norm is over all shards.
        max_norm: The largest norm; None only measures.

    Returns:
        The norm before scaling, a float32 scalar on the device, the same on every rank.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def step_if_finite(optimizer: torch.optim.Optimizer, *values: torch.Tensor) -> torch.Tensor:
    """Steps the optimizer unless one of the values is not finite; the decision never leaves the device.

    The fused optimizers read `found_inf` in their kernel, as torch's GradScaler uses it: where it is 1, parameters,
    moments and step counts stay bitwise as they were.

    Args:
        optimizer: A fused torch optimizer.
        *values: Scalars on the device, the same on every rank: the loss, the gradient norm.

    Returns:
        A float32 scalar on the device: 1 where the step was skipped, else 0.

    Raises:
        ValueError: The optimizer is not fused, so it can't skip a step on the device.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError("step_if_finite needs a fused optimizer: build it with fused=True")
    found = torch.zeros((), device=values[0].device)
    for value in values:
        found = torch.maximum(found, (~torch.isfinite(value)).float())
    optimizer.found_inf = found  # type: ignore[attr-defined]
    optimizer.step()
    return found
