"""What a rank sends in a step: every collective, by its group of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

# What a collective of so many bytes (the larger of its input and output) sends from each of n
# ranks, as rings and direct exchanges do: NCCL's own account of bus bandwidth.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}

_OPERATORS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "allreduce_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}

# Operators of our own that hold an all-reduce inside: three sums a row and their number of columns,
# in float32.
_HIDDEN = ("motif::poly_norm_sharded", "motif::poly_norm_sharded_backward")


@dataclass(frozen=True)
class Collective:
    """One call of a collective."""

    kind: str
    """all-gather, reduce-scatter, all-reduce, all-to-all or broadcast."""

    ranks: tuple[int, ...]
    """The group's."""

    bytes: int
    """Its larger side on this rank."""

    @property
    def sent(self) -> float:
        """Bytes that leave this rank."""
        return self.bytes * _SENT[self.kind](len(self.ranks))


@dataclass
class Traffic:
    """Calls of one kind over one group."""

    name: str
    """What they are for."""

    kind: str
    """The collective."""

    ranks: int
    """Of the group."""

    link: str
    """"NVLink" where the group lies within one domain, else "network"."""

    blocking: bool
    """Whether computation waits for it: what it brings is used at once."""

    calls: float = 0
    """In a step."""

    sent: float = 0
    """Bytes that leave a rank in a step."""


@dataclass
class Groups:
    """The ranks of a mesh's dimensions, for telling what a collective is for."""

    dimensions: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """This rank's group in each dimension that has more than one rank."""

    domain: int = 8
    """GPUs in an NVLink domain; ranks are numbered domain by domain."""

    def link(self, ranks: Sequence[int]) -> str:
        """Over what a group's ranks reach each other: its slowest link."""
        return "NVLink" if len({rank // self.domain for rank in ranks}) == 1 else "network"

    def describe(self, call: Collective, phase: str) -> tuple[str, bool]:
        """What a collective is for, and whether computation waits for it."""
        found = next((name for name, ranks in self.dimensions.items() if ranks == call.ranks), "all")
        if call.kind == "all-to-all":
            return ("Muon", False) if phase == "optimizer" else ("Ulysses", True)
        if found == "tensor":
            return "tensor parallel", True
        if found == "shard" and call.kind in ("all-gather", "reduce-scatter"):
            return "FSDP", False
        if found == "replicate" and phase not in ("optimizer", "other"):
            return "HSDP", False
        return "norms and losses", True


def recognise(func: Any, args: tuple[Any, ...], outputs: Sequence[torch.Tensor]) -> Collective | None:
    """The collective that an operator is, or None; one over a single rank is none.

    Args:
        func: the operator, as a dispatch mode gets it.
        args: its arguments.
        outputs: tensors that it returned.
    """
    name = func._schema.name
    namespace, _, operator = name.partition("::")
    if name in _HIDDEN:
        x = args[1] if operator.endswith("backward") else args[0]
        ranks = _ranks(next(a for a in reversed(args) if isinstance(a, str)))
        return Collective("all-reduce", ranks, 4 * (3 * math.prod(x.shape[:-1]) + 1)) if len(ranks) > 1 else None
    if namespace not in ("c10d", "_c10d_functional") or operator not in _OPERATORS:
        return None
    group: Any
    if namespace == "c10d":
        group = next(a for a in args if isinstance(a, torch.ScriptObject | dist.ProcessGroup))
    else:
        group = next(a for a in reversed(args) if isinstance(a, str) and a not in ("sum", "avg", "max", "min"))
    ranks = _ranks(group)
    if len(ranks) == 1:
        return None
    sides = [_bytes(a) for a in args] + ([_bytes(outputs)] if namespace == "_c10d_functional" else [])
    return Collective(_OPERATORS[operator], ranks, max(sides))


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def _ranks(group: Any) -> tuple[int, ...]:
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(group))
