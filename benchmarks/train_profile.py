"""Where a training step goes: its five largest costs, and a long table of operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

LARGEST = 5


class Cost(TypedDict):
    """A kernel or an operator."""

    name: str
    seconds: float
    """Its own time in a step, without what it calls."""
    share: float
    """Of the time of all of its kind."""
    calls: float
    """In a step."""


class Costs(TypedDict):
    """A step, cut up."""

    kind: str
    """"GPU kernels" or "CPU operators"."""
    seconds: float
    """What all of them take in a step, one after the other."""
    wall_seconds: float
    """A step by the clock, slowed by the profiler."""
    largest: list[Cost]
    other: float
    """The share that is left."""


def largest_costs(step: Callable[[], object], steps: int, device: str) -> Costs:
    """Profile some steps.

    Args:
        step: takes one, finished when it returns; warm.
        steps: how many.
        device: "cpu" for operators, "cuda" for kernels.
    """
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wall = time.perf_counter() - began
    return cut_up(profiler.key_averages(), steps, wall, cuda=cuda)


def cut_up(averages: Iterable[Any], steps: int, wall_seconds: float, *, cuda: bool) -> Costs:
    """The largest costs of a profile.

    Args:
        averages: as torch's profiler gives them, one for each operator and for each kernel.
        steps: how many steps were profiled.
        wall_seconds: what they took by the clock.
        cuda: whether kernels are wanted, else operators.
    """
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    found: list[Cost] = []
    for event in averages:
        # On a GPU a named range lasts as long as the kernels in it, which are listed themselves. On
        # a CPU what is left of one is Python's own time.
        if event.device_type != wanted or (cuda and (event.is_user_annotation or event.key.startswith("step: "))):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        if microseconds > 0:
            seconds = microseconds * 1e-6 / steps
            found.append({"name": event.key, "seconds": seconds, "share": 0.0, "calls": event.count / steps})
    total = sum(cost["seconds"] for cost in found)
    for cost in found:
        cost["share"] = cost["seconds"] / total
    named = [cost for cost in found if not cost["name"].startswith("step: ")]
    largest = sorted(named, key=lambda cost: -cost["seconds"])[:LARGEST]
    return {
        "kind": "GPU kernels" if cuda else "CPU operators",
        "seconds": total,
        "wall_seconds": wall_seconds / steps,
        "largest": largest,
        "other": 1 - sum(cost["share"] for cost in largest) if found else 0.0,
    }


def operator_table(step: Callable[[], object], steps: int, device: str, rows: int = 25) -> str:
    """Operators of some warm steps, by their own time without the operators they call, as torch's
    profiler prints.
    """
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=64)
    return table
