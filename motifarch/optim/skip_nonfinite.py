"""The skipping of non-finite steps, without waiting for the device."""

import torch


def step_if_finite(
    optimizer: torch.optim.Optimizer, *values: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Steps the optimizer unless one of the values is not finite; the decision never leaves the
    device.

    The fused optimizers read `found_inf` in their kernel, as torch's GradScaler uses it: where it
    is 1, parameters, moments and step counts stay bitwise as they were.

    Args:
        optimizer: a fused torch optimizer.
        *values: tensors on the device, the same on every rank: the loss, the gradient norm.
        skip: a scalar on the device, 1 where the step must be skipped for another reason
            (see `SpikeGuard`), else 0.

    Returns:
        A float32 scalar on the device: 1 where the step was skipped, else 0.

    Raises:
        ValueError: the optimizer is not fused, so it can't skip a step on the device.
    """
    if not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError("step_if_finite needs a fused optimizer: build it with fused=True")
    found = torch.zeros((), device=values[0].device) if skip is None else skip.float()
    for value in values:
        found = torch.maximum(found, (~torch.isfinite(value)).any().float())
    optimizer.found_inf = found  # type: ignore[attr-defined]
    optimizer.step()
    return found
