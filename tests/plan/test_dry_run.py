"""A dry run stands on one of torch's internals: here it is pinned."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode

from motifarch.plan.dry_run import FIND_SHAPES, fake_world
from motifarch.plan.memory import replaced


class Shapes(TorchDispatchMode):
    """Notes the shapes of additions on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        if "add" in func._schema.name:
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_dtensor_finds_shapes_on_whole_tensors_in_the_method_that_is_replaced() -> None:
    original = getattr(ShardingPropagator, FIND_SHAPES)
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args[1])
        return original(*args)

    with fake_world(2), replaced(ShardingPropagator, FIND_SHAPES, counted):
        mesh = init_device_mesh("cpu", (2,))
        x = DTensor.from_local(torch.zeros(3, 4), mesh, [Shard(0)])
        with Shapes() as shapes:
            assert (x + x).shape == (6, 4)
        assert len(calls) == 1
        # The rank's own addition, and before it the whole tensor's, which no rank computes.
        assert sorted(shapes.seen) == [(3, 4), (6, 4)]
    assert getattr(ShardingPropagator, FIND_SHAPES) is original
