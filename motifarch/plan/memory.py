"""What lies in a rank's memory while a step runs, by kind, and when it was most.

Storages are followed from the operator that made them to their end, refills by FSDP2 included.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from motifarch.decoder_layers import decoder_layers
from motifarch.shards import to_local

PARAMETERS = "parameters"
OPTIMIZER = "optimizer state"
GRADIENTS = "gradients"
GATHERED = "gathered parameters"
ACTIVATIONS = "activations"
LOSS = "logits and loss"
WORKING = "working memory"
KINDS = (PARAMETERS, OPTIMIZER, GRADIENTS, GATHERED, ACTIVATIONS, LOSS, WORKING)


EXPERTS = {kind: f"experts' {kind}" for kind in (PARAMETERS, OPTIMIZER, GRADIENTS)}
"""What of a kind belongs to routed experts."""


def local_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of this rank's shards."""
    return sum(shard.numel() * shard.element_size() for shard in map(to_local, tensors))


def experts_apart(sizes: dict[str, int], experts: dict[str, int], whole: dict[str, int]) -> dict[str, int]:
    """Bytes by kind, routed experts' as kinds of their own: `experts` of `whole` are theirs."""
    found = {}
    for kind, size in sizes.items():
        theirs = round(size * experts[kind] / whole[kind]) if kind in EXPERTS and whole[kind] else 0
        found[kind] = size - theirs
        if kind in EXPERTS and any(experts.values()):
            found[EXPERTS[kind]] = theirs
    return found


def whole_bytes(value: Any) -> int:
    """Bytes of a tensor, or of those in a list; 0 for anything else."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(whole_bytes, value)) if isinstance(value, list | tuple) else 0


def optimizer_state(
    optimizer: torch.optim.Optimizer, *, offloaded: bool
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[tuple[torch.Tensor, torch.Tensor]]]:
    """An optimizer's state with its parameters: what lies on the GPU between steps, and what in the
    CPU's memory.

    If `motifarch.optim.offload_state` keeps its moments, those have their parameters' shape.
    """
    here: list[tuple[torch.Tensor, torch.Tensor]] = []
    there: list[tuple[torch.Tensor, torch.Tensor]] = []
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                moved = offloaded and name != "step" and value.shape == parameter.shape
                (there if moved else here).append((parameter, value))
    return here, there


@dataclass
class _Block:
    kind: str
    bytes: int
    alive: weakref.ref[torch.UntypedStorage]


@dataclass
class Stretch:
    """What lived, in bytes by kind, during one stretch of a step."""

    peak: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """When it was most together."""
    highest: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """The most of each kind, at a time of its own."""
    phase: str = ""
    """What was being done at the peak."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


Place = tuple[str, int, int]
"""A stretch of a step: what is done, in which micro-batch, in which decoder layer (-1 for none)."""


@dataclass
class MemoryLedger:
    """Live storages by kind, in bytes."""

    now: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    """What lives."""
    stretches: dict[Place, Stretch] = field(default_factory=dict)
    """What lived in each stretch so far."""
    _blocks: dict[int, _Block] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes that live."""
        return sum(self.now.values())

    def note(self, tensor: torch.Tensor, kind: str, *, again: bool = False) -> None:
        """Begins to follow a tensor's storage, of one of KINDS; `again` gives it to a known one."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        block = self._blocks.get(key)
        if block is None:

            def gone(_: object) -> None:
                ended = self._blocks.pop(key)
                self.now[ended.kind] -= ended.bytes

            size = storage.nbytes()
            self._blocks[key] = _Block(kind, size, weakref.ref(storage, gone))
            self.now[kind] += size
        elif again and block.kind != kind:
            self._move(block, kind)

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Counts a tensor's storage as nothing: on a GPU it would lie in the CPU's memory."""
        self.note(tensor, WORKING)
        block = self._blocks[tensor.untyped_storage()._cdata]
        self.now[block.kind] -= block.bytes
        block.bytes = 0

    def rename(self, before: str, after: str) -> None:
        """Everything alive of one kind becomes another."""
        for block in self._blocks.values():
            if block.kind == before:
                self._move(block, after)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size."""
        block = self._blocks.get(storage._cdata)
        if block is not None:
            self.now[block.kind] += storage.nbytes() - block.bytes
            block.bytes = storage.nbytes()

    def look(self, place: Place, phase: str) -> None:
        """Remembers the present, if it is the most there was in its stretch."""
        stretch = self.stretches.setdefault(place, Stretch())
        for kind, bytes_ in self.now.items():
            if bytes_ > stretch.highest[kind]:
                stretch.highest[kind] = bytes_
        if self.total > stretch.total:
            stretch.peak, stretch.phase = dict(self.now), phase

    def _move(self, block: _Block, kind: str) -> None:
        self.now[block.kind] -= block.bytes
        self.now[kind] += block.bytes
        block.kind = kind

    @contextmanager
    def following_resizes(self) -> Iterator[None]:
        """FSDP2 frees parameters by emptying their storage, which no operator shows."""
        original = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = original(storage, size)
            self.resized(storage)
            return result

        with replaced(torch.UntypedStorage, "resize_", resize):
            yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, an attribute of a class or a module is another."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def gathered_bytes(model: nn.Module, compute_dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that FSDP2 gathers: the largest decoder layer, and all that is outside of layers."""

    def whole(parameters: Iterable[nn.Parameter]) -> int:
        return sum(_without_fsdp(p) for p in parameters) * compute_dtype.itemsize

    layers = decoder_layers(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return max(whole(layer.parameters()) for layer in layers), whole(
        p for p in model.parameters() if id(p) not in inside
    )


def _without_fsdp(parameter: torch.Tensor) -> int:
    """Numbers of a parameter that a rank computes with: tensor and expert parallelism's part."""
    if not isinstance(parameter, DTensor):
        return parameter.numel()
    mesh, count = parameter.device_mesh, parameter.numel()
    for name, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
        if name in ("tensor", "expert") and hasattr(placement, "dim"):
            count //= size
    return count
