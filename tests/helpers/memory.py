"""How much memory a computation asks for."""

from collections.abc import Callable

import torch

_MARK = "mark: "


def largest_allocation(function: Callable[[], object]) -> int:
    """Bytes of the largest single allocation that ``function`` makes, inside operators too."""
    return max(bytes_ for name, bytes_ in _events(function) if name == "[memory]")


def mark(name: str) -> None:
    """Names this moment for :func:`live_bytes`."""
    with torch.profiler.record_function(_MARK + name):
        pass


def live_bytes(function: Callable[[], object]) -> dict[str, int]:
    """Bytes that the allocator has given out since ``function`` began, inside operators too: when
    it calls :func:`mark`, by name, and the most there were, as "peak"; and as "allocated" all that
    it has given out, whatever it took back.
    """
    live, found = 0, {"peak": 0, "allocated": 0}
    for name, bytes_ in _events(function):
        if name == "[memory]":
            live += bytes_
            found["allocated"] += max(bytes_, 0)
            found["peak"] = max(found["peak"], live)
        elif name.startswith(_MARK):
            found[name.removeprefix(_MARK)] = live
    return found


def _events(function: Callable[[], object]) -> list[tuple[str, int]]:
    """The profiler's events in their order: names, and bytes of "[memory]", negative if freed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return [(event.name(), event.nbytes()) for event in events]
