"""The global gradient norm of parameters that are sharded in several ways, and clipping to it."""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from motifarch.shards import to_local


def _copies(gradient: torch.Tensor) -> int:
    """On how many ranks the same part of a gradient lies."""
    if not isinstance(gradient, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    mesh = gradient.device_mesh
    # By the attribute: is_shard says no to FSDP's shards over those of tensor parallelism.
    parts = math.prod(mesh.size(i) for i, placement in enumerate(gradient.placements) if hasattr(placement, "dim"))
    return dist.get_world_size() // parts


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Scales gradients so that their global norm is at most max_norm; None only measures.

    The parameters may be DTensors of different meshes: the norm is over all shards, each part of a
    gradient counted once. If any is a DTensor, all ranks call this together.

    Returns:
        The norm before scaling, a float32 scalar on the device, the same on every rank.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = any(isinstance(g, DTensor) for g in gradients)
    locals_ = [to_local(g) for g in gradients]
    if not gradients:
        return torch.zeros(())
    norms = torch.stack([n.float() for n in torch._foreach_norm(locals_)])
    if sharded:
        copies = torch.tensor([_copies(g) for g in gradients], dtype=torch.float32, device=norms.device)
        square = (norms.square() / copies).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
    else:
        norm = torch.linalg.vector_norm(norms)
    if max_norm is not None:
        torch._foreach_mul_(locals_, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm
