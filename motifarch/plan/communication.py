"""What a rank sends in a step: every collective, by its group of ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from motifarch.plan.memory import whole_bytes

_KINDS = ("all-gather", "reduce-scatter", "all-to-all", "all-reduce", "broadcast")

# Operators of our own that hold an all-reduce: three float32 sums a row, and their columns' number.
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
    group: str
    """The group's name, which tells groups of the same ranks apart."""
    kept: float | None = None
    """Of an all-to-all, the part of these bytes that stays on this rank, if it is uneven."""

    @property
    def sent(self) -> float:
        """Bytes that leave this rank or reach it, whichever are more, by rings or direct exchanges:
        NCCL's bus bandwidth.
        """
        n = len(self.ranks)
        if self.kept is not None:
            return self.bytes * (1 - self.kept)
        return self.bytes * ((2 if self.kind == "all-reduce" else 1) * (n - 1) / n)


@dataclass
class Traffic:
    """Calls of one kind over one group."""

    name: str
    """What they are for."""
    kind: str
    """The collective."""
    ranks: int
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
    """The groups of a mesh's dimensions, for telling what a collective is for."""

    dimensions: dict[str, str] = field(default_factory=dict)
    """What dimension each of this rank's groups is of, by the group's name."""
    domain: int = 8
    """GPUs in an NVLink domain; ranks are numbered domain by domain."""

    def link(self, ranks: Sequence[int]) -> str:
        """Over what a group's ranks reach each other: its slowest link."""
        return "NVLink" if len({rank // self.domain for rank in ranks}) == 1 else "network"

    def describe(self, call: Collective, phase: str) -> tuple[str, bool]:
        """What a collective is for, and whether computation waits for it."""
        found = self.dimensions.get(call.group, "all")
        if call.kind == "all-to-all":
            if phase == "optimizer":
                return "Muon", False
            if found == "expert":
                return "experts: dispatch, combine", True
            # Of a halo a rank keeps nothing, of a sequence traded for heads its own part.
            return ("halo" if call.kept == 0 else "Ulysses"), True
        if found == "tensor":
            return "tensor parallel", True
        whose = "experts: " if found.startswith("expert ") else ""
        if found.endswith("shard") and call.kind in ("all-gather", "reduce-scatter"):
            return f"{whose}FSDP", False
        if found.endswith("replicate") and phase not in ("optimizer", "other"):
            return f"{whose}HSDP", False
        return "norms and losses", True


def recognise(func: Any, args: tuple[Any, ...], outputs: Sequence[torch.Tensor]) -> Collective | None:
    """The collective that an operator is, or None; one over a single rank is none.

    The operator, its arguments and the tensors it returned are those of a dispatch mode.
    """
    name = func._schema.name
    namespace, _, operator = name.partition("::")
    if name in _HIDDEN:
        x = args[1] if operator.endswith("backward") else args[0]
        ranks, name = _group(next(a for a in reversed(args) if isinstance(a, str)))
        size = 4 * (3 * math.prod(x.shape[:-1]) + 1)
        return Collective("all-reduce", ranks, size, name) if len(ranks) > 1 else None
    # torch spells one collective as allgather_, _allgather_base_, all_gather_into_tensor, ...
    kind = next((k for k in _KINDS if k.replace("-", "") in operator.replace("_", "")), None)
    if namespace not in ("c10d", "_c10d_functional") or kind is None:
        return None
    group: Any
    if namespace == "c10d":
        group = next(a for a in args if isinstance(a, torch.ScriptObject | dist.ProcessGroup))
    else:
        group = next(a for a in reversed(args) if isinstance(a, str) and a not in ("sum", "avg", "max", "min"))
    ranks, name = _group(group)
    if len(ranks) == 1:
        return None
    sides = [*args, outputs] if namespace == "_c10d_functional" else args
    splits = [a for a in args if isinstance(a, list | tuple) and a and all(isinstance(n, int) for n in a)]
    kept = None
    if kind == "all-to-all" and len(splits) == 2:
        larger = max(splits, key=sum)
        kept = larger[ranks.index(dist.get_rank())] / max(1, sum(larger))
    return Collective(kind, ranks, max(map(whole_bytes, sides)), name, kept)


def _group(group: Any) -> tuple[tuple[int, ...], str]:
    """The ranks and the name of a process group, as an operator gets it."""
    if isinstance(group, str):
        group = dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    elif not isinstance(group, dist.ProcessGroup):
        group = dist.ProcessGroup.unbox(group)
    return tuple(dist.get_process_group_ranks(group)), group.group_name
