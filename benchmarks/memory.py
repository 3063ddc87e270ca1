"""What a differentiable function keeps for its backward, and the most that a computation holds at
once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The profiler that counts a CPU's allocations announces each start and stop otherwise. Read when it
# first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def saved_bytes(forward: Callable[[], Tensor], inputs: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of the storages that autograd keeps for the backward: "total", and "beyond_inputs"."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # held, so that no two storages can have had one address
    given = {t.untyped_storage().data_ptr() for t in inputs}
    total, beyond = sum(kept.values()), sum(size for address, size in kept.items() if address not in given)
    del out
    return {"total": total, "beyond_inputs": beyond}


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes that ``function`` and its result hold at once, beyond what was allocated
    before.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
