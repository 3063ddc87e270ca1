"""Which rows and columns of a whole tensor each rank of a mesh holds, and which ranks hold one copy
of it together.

DTensor says where a shard begins; with tensor parallelism under FSDP2 a shard can be several
stretches of rows, so here every stretch is named.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

Ranges = tuple[tuple[int, int], ...]
"""Stretches [start, stop) of consecutive indices, in the order in which a shard has them."""


def _take(ranges: Ranges, start: int, stop: int) -> Ranges:
    """The indices at places start to stop of a shard."""
    taken = []
    for first, last in ranges:
        begin, end = max(start, 0), min(stop, last - first)
        if begin < end:
            taken.append((first + begin, first + end))
        start, stop = start - (last - first), stop - (last - first)
    return tuple(taken)


def _chunk(ranges: Ranges, chunks: int, index: int) -> Ranges:
    """As torch.chunk cuts: equal sizes, rounded up; the last may be short or empty."""
    size = -(-length(ranges) // chunks)
    return _take(ranges, index * size, (index + 1) * size)


def length(ranges: Ranges) -> int:
    """How many indices there are."""
    return sum(stop - start for start, stop in ranges)


@cache
def held_ranges(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], coordinate: tuple[int, ...]
) -> tuple[Ranges, ...]:
    """The indices along each dimension that the rank at a coordinate of a mesh holds, as stretches;
    a shard's rows lie in their order.

    There is a placement for each dimension of the mesh: Shard, Replicate, or the _StridedShard that
    FSDP2 over tensor parallelism makes (cut first into as many parts as the later mesh dimensions
    will, then each of those into shares).

    Raises:
        ValueError: a placement that is none of these (a partial sum has no shards).
    """
    held: list[Ranges] = [((0, size),) for size in shape]
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, _StridedShard):
            factor, ranges = int(placement.split_factor), held[placement.dim]
            shares = [_chunk(_chunk(ranges, factor, i), parts, index) for i in range(factor)]
            held[placement.dim] = tuple(itertools.chain(*shares))
        elif isinstance(placement, Shard):
            held[placement.dim] = _chunk(held[placement.dim], parts, index)
        elif not isinstance(placement, Replicate):
            raise ValueError(f"the placement {placement} is not accepted here: use Shard or Replicate")
    return tuple(held)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a tensor, not a copy of it; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_ranges(tensor: torch.Tensor) -> tuple[Ranges, ...]:
    """The indices along each dimension that this rank holds of a tensor, all of them where it is no
    DTensor.

    Raises:
        ValueError: the local tensor is not the shard that its placements describe.
    """
    if not isinstance(tensor, DTensor):
        return tuple(((0, size),) for size in tensor.shape)
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None  # who has a DTensor's shard is in its mesh
    held = held_ranges(tuple(tensor.shape), tuple(tensor.device_mesh.shape), tensor.placements, tuple(coordinate))
    local = tuple(tensor.to_local().shape)
    if local != tuple(map(length, held)):
        raise ValueError(
            f"a tensor of {tuple(tensor.shape)} placed as {tensor.placements} has the local shape {local}, where "
            f"{tuple(map(length, held))} is expected; shard it with fully_shard or distribute_tensor"
        )
    return held


def local_shard(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank keeps of a whole tensor that is sharded as ``like``, of the same global shape;
    a plain tensor is kept whole.

    Raises:
        ValueError: the local part of ``like`` is not the shard that its placements describe.
    """
    for dim, ranges in enumerate(local_ranges(like)):
        if ranges != ((0, whole.shape[dim]),):
            # A rank may hold no row at all, and torch.cat takes no empty list.
            parts = [whole.narrow(dim, start, stop - start) for start, stop in ranges or ((0, 0),)]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return whole


@dataclass(frozen=True)
class CopyGroup:
    """The ranks that hold one copy of a tensor together, each its own part."""

    ranks: tuple[int, ...]
    """Numbers in the world, rising: places in the process group."""
    coordinates: tuple[tuple[int, ...], ...]
    """Where in the mesh each of them is."""


def copy_group(mesh: DeviceMesh, placements: Sequence[Placement]) -> CopyGroup:
    """The ranks that hold a whole copy with this one: they differ in sharded dimensions alone."""
    mine = mesh.get_coordinate()
    assert mine is not None
    axes = [
        range(size) if not isinstance(placement, Replicate) else (own,)
        for size, placement, own in zip(mesh.shape, placements, mine, strict=True)
    ]
    with unset_fake_temporarily():  # a mesh's numbers are read also where a step is traced on fake tensors
        ranks = mesh.mesh
        found = sorted((int(ranks[place]), place) for place in itertools.product(*axes))
    return CopyGroup(tuple(rank for rank, _ in found), tuple(place for _, place in found))


def open_group(mesh: DeviceMesh, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """These ranks' process group, which they open together; None for a single rank."""
    if len(ranks) == 1:
        return None
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    for group in mesh.get_all_groups():
        if tuple(dist.get_process_group_ranks(group)) == ranks:
            return group
    return dist.new_group(list(ranks), use_local_synchronization=True)
