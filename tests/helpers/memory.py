"""How much memory a computation asks for."""

from collections.abc import Callable

import torch


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest single allocation that ``function`` makes, inside operators too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
