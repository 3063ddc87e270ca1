"""Finds values that are not finite in a state: a step from such weights makes all others so."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist

from motifarch.shards import to_local


def first_nonfinite(content: Mapping[str, Any], group: dist.ProcessGroup | None) -> str | None:
    """The name of the first tensor that holds NaN or infinity, on any rank; None where none does.

    Every value is read once, on its device.

    Args:
        content: nested dictionaries of tensors, sharded or not; what else is in them is passed by.
        group: whose ranks call it alike and get the same answer; it takes tensors on the CPU. None
            for one process alone.
    """
    names, largest = [], []
    for name, tensor in _tensors(content):
        local = to_local(tensor.detach())
        names.append(name)
        # The largest magnitude is NaN where any value is. A rank may hold no part of a tensor.
        largest.append(torch.linalg.vector_norm(local, float("inf")) if local.numel() else torch.zeros(()))
    if not names:
        return None
    devices = {value.device for value in largest}
    bad = torch.zeros(len(names), dtype=torch.uint8)
    for device in devices:
        places = [i for i, value in enumerate(largest) if value.device == device]
        bad[places] = (~torch.stack([largest[i].float() for i in places]).isfinite()).to("cpu", torch.uint8)
    if group is not None:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    return names[int(bad.argmax())] if bad.any() else None


def _tensors(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            yield f"{prefix}{name}", value
