"""Seconds of a few calls that take turns, on the clock of the device they run on, and what that
device can do at most.

A kernel's *floor* is the least time in which a device could do its work, going by what it was
measured to do in the same run: the bytes over the bandwidth of a copy, or the operations over the
rate of a matrix product, whichever is longer.
"""

from __future__ import annotations

import gc
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(eq=False)
class Work:
    """A call to time. Each repetition prepares afresh, untimed, and hands the call what that
    returned.
    """

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    lead: float = 100e-6
    """Seconds by which the host should be ahead of a GPU when the call begins there; grows until it
    suffices.
    """


class Timing(NamedTuple):
    """One repetition."""

    seconds: float
    """The device's time."""
    host_seconds: float
    """What it took the host to issue the work; on a CPU the same."""


class Clock(ABC):
    """Times one repetition of a call."""

    @abstractmethod
    def time(self, work: Work) -> Timing:
        """Prepare, then run and time the call."""


class CpuClock(Clock):
    """Wall time. Caches are as the contender before left them."""

    def time(self, work: Work) -> Timing:
        """Prepare, then run and time the call."""
        given = work.prepare()
        start = time.perf_counter()
        result = work.call(given)
        elapsed = time.perf_counter() - start
        del result  # freed only after the clock stopped
        return Timing(elapsed, elapsed)


class CudaClock(Clock):
    """The GPU's own time between two events, from a cold second-level cache and with the launches
    already queued.

    Before the call a buffer larger than the L2 cache is overwritten, and the GPU is kept waiting
    until the host has issued everything: short kernels are then not charged for the time that
    Python takes to launch them, which in a training step passes while earlier kernels run.
    """

    _LONGEST_LEAD = 20e-3
    _CYCLES_PER_SECOND = 2e9  # no current GPU's clock is much faster

    def __init__(self, device: torch.device):
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flush = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)

    def time(self, work: Work) -> Timing:
        """Prepare, then run and time the call; again, with a longer lead, where the host came too
        late.
        """
        while True:
            given = work.prepare()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            torch.cuda._sleep(int(work.lead * self._CYCLES_PER_SECOND))
            start.record()
            began = time.perf_counter()
            result = work.call(given)
            host = time.perf_counter() - began
            end.record()
            late = start.query()
            end.synchronize()
            del result, given
            if not late or work.lead >= self._LONGEST_LEAD:
                return Timing(start.elapsed_time(end) * 1e-3, host)
            work.lead = min(max(2 * work.lead, 1.5 * host), self._LONGEST_LEAD)


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def time_in_turns(
    turns: Mapping[str, Mapping[str, Work]],
    clock: Clock,
    *,
    seconds: float,
    minimum: int = 5,
    maximum: int = 200,
    warmup: int = 1,
) -> dict[str, dict[str, list[Timing]]]:
    """Time every contender's works in rounds, in an order of contenders that rotates.

    Args:
        turns: contender -> name of the work -> work.
        clock: what times one.
        seconds: goes on for this long for each contender, preparation included,
        minimum: but for at least so many rounds,
        maximum: and at most so many.
        warmup: untimed rounds before them.

    Returns:
        contender -> name of the work -> a timing for each round.
    """
    names = list(turns)
    timings: dict[str, dict[str, list[Timing]]] = {name: {what: [] for what in turns[name]} for name in names}
    begun = time.perf_counter()
    for i in range(-warmup, maximum):
        if i == 0:
            begun = time.perf_counter()
        if i >= minimum and time.perf_counter() - begun >= seconds * len(names):
            break
        # Nobody always follows the same contender, whose leavings in caches and allocator it would
        # inherit.
        first = i % len(names)
        gc.collect()
        gc.disable()
        try:
            for name in names[first:] + names[:first]:
                for what, work in turns[name].items():
                    timing = clock.time(work)
                    if i >= 0:
                        timings[name][what].append(timing)
        finally:
            gc.enable()
    return timings


def copy_bandwidth(device: torch.device, clock: Clock, *, bytes_: int, seconds: float) -> float:
    """Bytes a second that copying a large tensor moves, reads and writes counted; the median of
    several copies.
    """
    source = torch.ones(bytes_, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * bytes_ / _median_seconds(lambda: target.copy_(source), clock, seconds)


def matrix_rate(device: torch.device, clock: Clock, dtype: torch.dtype, *, size: int, seconds: float) -> float:
    """Operations a second of torch's product of two square matrices of that size; the median of
    several products.

    The numbers are random: a GPU's clock falls with the bits that change, and zeros are multiplied
    faster.
    """
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b, out=out), clock, seconds)


def _median_seconds(call: Callable[[], object], clock: Clock, seconds: float) -> float:
    turns = {"": {"": Work(lambda _: call())}}
    timings = time_in_turns(turns, clock, seconds=seconds, minimum=7, warmup=3)
    return statistics.median(t.seconds for t in timings[""][""])


class Floor(NamedTuple):
    """The seconds that a piece of work takes at least."""

    bytes: float
    """For what it must move."""
    operations: float | None
    """For its matrix products; None where it has none worth counting."""
    floor: float
    """The larger of both."""


@dataclass(frozen=True)
class Limits:
    """What a device was measured to do."""

    copied: int
    """Bytes of the tensor that was copied."""
    bytes_per_second: float
    """Of its copy, reads and writes counted."""
    matrix_size: int
    operations_per_second: Mapping[str, float]
    """Of a matrix product, by the name of its dtype."""

    def floor(self, bytes_: float, operations: float | None = None, dtype: str = "") -> Floor:
        """The floor of a piece of work.

        Args:
            bytes_: that it must move.
            operations: of its matrix products, or None.
            dtype: theirs, one of those measured.
        """
        by_bytes = bytes_ / self.bytes_per_second
        by_operations = None if operations is None else operations / self.operations_per_second[dtype]
        return Floor(by_bytes, by_operations, max(by_bytes, by_operations or 0.0))

    def content(self) -> dict[str, Any]:
        """For a results file: "copy" and, where products were measured, "matrix"."""
        found: dict[str, Any] = {"copy": {"bytes": self.copied, "gb_per_second": self.bytes_per_second * 1e-9}}
        if self.operations_per_second:
            tflops = {name: rate * 1e-12 for name, rate in self.operations_per_second.items()}
            found["matrix"] = {"size": self.matrix_size, "tflops": tflops}
        return found


def measure_limits(
    device: torch.device, clock: Clock, dtypes: Mapping[str, torch.dtype], *, seconds: float, quick: bool
) -> Limits:
    """Measure what a device can do.

    Args:
        device: which.
        clock: its clock.
        dtypes: whose matrix products to time, by name; for kernels that have none, nothing.
        seconds: of measuring each, one at most.
        quick: tiny sizes, whose rates mean nothing.
    """
    cuda, seconds = device.type == "cuda", min(seconds, 1.0)
    copied = (4 << 20) if quick else (1 << 30) if cuda else (256 << 20)
    # Large enough that a GPU is busy from end to end; a CPU's cores are with far less.
    size = 128 if quick else 8192 if cuda else 1024
    bandwidth = copy_bandwidth(device, clock, bytes_=copied, seconds=seconds)
    rates = {name: matrix_rate(device, clock, dtype, size=size, seconds=seconds) for name, dtype in dtypes.items()}
    return Limits(copied, bandwidth, size, rates)
