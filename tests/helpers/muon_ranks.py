"""Muon on sharded matrices against whole ones, and what it sends: for ranks to run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from helpers.micro_batches import Collectives
from motifarch.optim import Muon
from motifarch.parallel import World, open_world
from motifarch.shards import local_shard

STEPS = 10
# Rows that no number of ranks divides, fewer rows than ranks, tall and wide, two of one shape.
SHAPES = [(12, 8), (7, 16), (1, 6), (3, 20), (33, 10), (12, 8), (5, 5)]


def placements(ranks: int) -> Iterator[tuple[DeviceMesh, tuple[Placement, ...]]]:
    """Meshes of all ranks with ways to place a matrix on them."""
    line = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
    yield from ((line, (p,)) for p in (Shard(0), Shard(1), Replicate()))
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("first", "second"))
        yield from (
            (square, pair)
            for pair in (
                (Shard(0), Shard(1)),
                (Shard(1), Shard(0)),
                (Shard(0), Shard(0)),
                (Replicate(), Shard(0)),
                (Shard(1), Replicate()),
            )
        )


def fsdp_and_tensor_parallel(ranks: int, shapes: list[tuple[int, int]]) -> nn.Module:
    """Linear layers cut over two ranks by rows or columns, then by FSDP2 over all pairs."""
    mesh = init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    model = nn.Sequential(*[nn.Linear(columns, rows, bias=False) for rows, columns in shapes])
    styles = (ColwiseParallel(), RowwiseParallel())
    parallelize_module(model, mesh["tensor"], {str(i): styles[i % 2] for i in range(len(shapes))})
    for layer in model:
        fully_shard(layer, mesh=mesh["data"])
    return model


def sharded_copies(ranks: int) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """The same matrices placed in every way, and whole, with random values."""
    torch.manual_seed(0)
    sharded, whole = [], []
    for mesh, placed in placements(ranks):
        for shape in SHAPES:
            value = torch.randn(shape)
            whole.append(value.clone())  # a replicated DTensor may be the tensor it was made of
            sharded.append(nn.Parameter(distribute_tensor(value, mesh, placed)))
    # Where the rows are cut twice, first by tensor parallelism: _StridedShard. Uneven both ways.
    shapes = [(10, 6), (7, 12), (6, 9), (20, 8), (2, 4), (7, 6)]
    torch.manual_seed(1)
    whole += [nn.Linear(columns, rows, bias=False).weight.detach() for rows, columns in shapes]
    torch.manual_seed(1)
    return [*sharded, *fsdp_and_tensor_parallel(ranks, shapes).parameters()], whole


def give_gradients(sharded: list[nn.Parameter], whole: list[nn.Parameter]) -> None:
    for part, full in zip(sharded, whole, strict=True):
        full.grad = torch.randn_like(full)
        local = local_shard(full.grad, part)
        assert isinstance(part, DTensor)
        part.grad = DTensor.from_local(local, part.device_mesh, part.placements, shape=part.shape, stride=part.stride())


@contextmanager
def counted() -> Iterator[list[int]]:
    """Notes the bytes that this rank puts into every all-to-all, its own part included."""
    calls: list[int] = []
    plain: Callable[..., Any] = dist.all_to_all_single

    def count(output: torch.Tensor, given: torch.Tensor, *sizes: Any, **options: Any) -> Any:
        calls.append(given.numel() * given.itemsize)
        return plain(output, given, *sizes, **options)

    dist.all_to_all_single = count
    try:
        yield calls
    finally:
        dist.all_to_all_single = plain


def check_steps(chunk_sizes: list[int]) -> None:
    """All that follows, in one process group: starting one takes longer than any of it."""
    with open_world() as world:
        for chunk_bytes in chunk_sizes:
            compare_with_whole(world, chunk_bytes)
            count_messages(world, chunk_bytes)
        compare_experts(world)


def compare_with_whole(world: World, chunk_bytes: int) -> None:
    """STEPS steps on every placement at once, with a second reading of what each rank holds."""
    parameters, values = sharded_copies(world.size)
    whole = [nn.Parameter(v.clone()) for v in values]
    for parameter, value in zip(parameters, values, strict=True):
        assert torch.equal(parameter.to_local(), local_shard(value, parameter))
    sharded = Muon(parameters, 1e-2, ns_dtype=torch.float32, chunk_bytes=chunk_bytes)
    plain = Muon(whole, 1e-2, ns_dtype=torch.float32)
    for _ in range(STEPS):
        give_gradients(parameters, whole)
        sharded.step()
        plain.step()
    for part, full, start in zip(parameters, whole, values, strict=True):
        assert (full - start).abs().max() > 1e-2  # steps that would show a difference
        momentum = sharded.state[part]["momentum_buffer"]
        for found, expected in ((part, full), (momentum, plain.state[full]["momentum_buffer"])):
            torch.testing.assert_close(found.to_local(), local_shard(expected, part), rtol=0, atol=1e-5)


def count_messages(world: World, chunk_bytes: int) -> None:
    """All-to-alls and bytes of one step, added up over the ranks."""
    mesh = init_device_mesh("cpu", (world.size,))
    matrices = [nn.Parameter(distribute_tensor(torch.randn(shape), mesh, [Shard(0)])) for shape in SHAPES]
    for dtype in (torch.bfloat16, torch.float32):
        optimizer = Muon(matrices, ns_dtype=dtype, chunk_bytes=chunk_bytes)
        give_gradients(matrices, [nn.Parameter(m.full_tensor()) for m in matrices])
        with counted() as calls:
            optimizer.step()
        (((_, family),),) = optimizer._shard_groups.values()
        assert len(calls) == 2 * len(family.chunks)
        if chunk_bytes == 1:
            assert len(family.chunks) == -(-len(SHAPES) // world.size)
        bytes_ = sum(rows * columns for rows, columns in SHAPES) * dtype.itemsize
        # The first call is a gathering and the last one a scattering; in between one or the other
        # comes first.
        total = world.all_reduce_sum([sum(calls), calls[0] if len(calls) == 2 else 0])
        assert total == [2 * bytes_, bytes_ if len(calls) == 2 else 0]


def expert_layouts(ranks: int) -> Iterator[tuple[DeviceMesh, tuple[Placement, ...]]]:
    """Meshes of all ranks with ways to place experts on them."""
    line = init_device_mesh("cpu", (ranks,))
    yield from ((line, (p,)) for p in (Shard(0), Replicate()))
    if ranks == 4:
        square = init_device_mesh("cpu", (2, 2))
        yield from ((square, pair) for pair in ((Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Replicate())))


def compare_experts(world: World) -> None:
    """Whole matrices of experts, on ranks that have more or fewer of them, or none."""
    torch.manual_seed(0)
    layouts = list(expert_layouts(world.size))
    # No number of ranks divides five; four ranks share two; one is whole somewhere.
    values = [torch.randn(experts, rows, columns) for experts, rows, columns in ((5, 8, 6), (2, 4, 9), (1, 5, 5))]
    sharded, whole = [], []
    for mesh, placed in layouts:
        sharded += [nn.Parameter(distribute_tensor(value.clone(), mesh, placed)) for value in values]
        whole += [nn.Parameter(value.clone()) for value in values]
    meshes = (
        init_device_mesh("cpu", (world.size,)),
        init_device_mesh("cpu", (world.size // 2, 2), mesh_dim_names=("replicate", "shard")),
    )
    for mesh in meshes:  # FSDP, HSDP
        for value in values:
            layer = nn.ParameterList([value.clone()])
            fully_shard(layer, mesh=mesh)
            sharded += layer.parameters()
            whole.append(nn.Parameter(value.clone()))
    for experts in {2, world.size}:  # expert parallelism, with FSDP over those who have the same ones
        mesh = init_device_mesh("cpu", (world.size // experts, experts), mesh_dim_names=("expert_shard", "expert"))
        for value in (torch.randn(12, 8, 6), torch.randn(world.size, 4, 9)):
            layer = nn.ParameterList([distribute_tensor(value.clone(), mesh["expert"], [Shard(0)])])
            fully_shard(layer, mesh=mesh["expert_shard"])
            sharded += layer.parameters()
            whole.append(nn.Parameter(value.clone()))
    parts = Muon(sharded, 1e-2, ns_dtype=torch.float32, chunk_bytes=8 * 6 * 4)
    plain = Muon(whole, 1e-2, ns_dtype=torch.float32)
    collectives = Collectives()
    for _ in range(STEPS):
        give_gradients(sharded, whole)
        with collectives:
            parts.step()
        plain.step()
    assert not collectives.calls
    for part, full in zip(sharded, whole, strict=True):
        momenta = parts.state[part]["momentum_buffer"], plain.state[full]["momentum_buffer"]
        for found, expected in ((part, full), momenta):
            torch.testing.assert_close(found.to_local(), local_shard(expected, part), rtol=0, atol=1e-6)
    for dimension in (1, 2):
        cut = nn.Parameter(distribute_tensor(values[0], layouts[0][0], [Shard(dimension)]))
        with pytest.raises(ValueError, match="which cuts the matrices; shard the first dimension alone"):
            Muon([cut])
