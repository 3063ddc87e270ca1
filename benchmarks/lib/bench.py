"""Time and memory of calls that take turns on one machine, and the roofline of that machine.

A GPU's times are its own (its clock, a cold L2 cache), without what a call costs on the host, which
is measured apart; a CPU's are those of ``torch.utils.benchmark``. Speed is a ratio between calls of
one run: they are timed in rounds, in an order that rotates.

The *roofline* of a piece of work is the least time in which the device could do it, by what it was
measured to do in the same run: bytes over the bandwidth of a copy, or FLOPs over the rate of a
matrix product, whichever takes longer.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

# The profiler that counts a CPU's allocations announces each start and stop otherwise. Read when
# it first starts.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

Clock = Callable[[Callable[[], object], float], list[float]]
"""Runs a function for about so many seconds -> seconds of each repetition."""


@dataclass(frozen=True, eq=False)
class Work:
    """A call to time, repeated on what ``prepare``, untimed, returned at the round's start."""

    call: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


# A GPU's cycles a second, at most: for waiting.
_CYCLES = 2e9


def gpu_clock(function: Callable[[], object], seconds: float) -> list[float]:
    """The GPU's time of each repetition.

    As ``triton.testing.do_bench`` does it, but the GPU waits until a repetition is queued whole:
    otherwise a short one would be timed with the host's way to its kernels.
    """
    from triton.runtime import driver

    cache = driver.active.get_empty_cache_for_benchmark()
    wait = int(_CYCLES * (2 * host_seconds(function, 3) + 2e-5))

    def repeat() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        driver.active.clear_cache(cache)
        torch.cuda._sleep(wait)
        start.record()
        function()
        end.record()
        return start, end

    began = time.perf_counter()
    pairs = [repeat()]
    torch.cuda.synchronize()
    pairs += [repeat() for _ in range(int(seconds / (time.perf_counter() - began)) - 1)]
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def host_seconds(function: Callable[[], object], calls: int = 20) -> float:
    """The median time after which a call returns, its kernels queued on a GPU that does nothing
    else.
    """
    taken = []
    for _ in range(calls):
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def clock_of_kernels(function: Callable[[], object], seconds: float) -> list[float]:
    """The GPU's time of each repetition without the host's: the GPU is held up until a repetition
    is queued. Launches of a short kernel else take longer than the kernel.
    """
    torch.cuda.synchronize()
    begun = time.perf_counter()
    function()
    host = time.perf_counter() - begun
    torch.cuda.synchronize()
    whole = time.perf_counter() - begun
    held = min(2 * host + 1e-4, 0.01)
    flushed = torch.empty(256 << 20, dtype=torch.int8, device="cuda")  # more than any cache holds
    pairs = []
    for _ in range(max(5, min(50, int(seconds / (whole + held))))):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flushed.zero_()
        torch.cuda._sleep(int(2e9 * held))  # cycles of a clock that is no faster
        start.record()
        function()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in pairs]


def cpu_clock(function: Callable[[], object], seconds: float) -> list[float]:
    """Wall time of one repetition, whatever ``seconds`` is: rounds give more."""
    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return [timer.timeit(1).mean]


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return gpu_clock if device.type == "cuda" else cpu_clock


class Timings(NamedTuple):
    """What :func:`time_side_by_side` measured."""

    seconds: dict[str, dict[str, list[float]]]
    """Provider -> name of the work -> seconds of each repetition."""
    failed: dict[str, str]
    """Provider -> why it could not be timed to the end."""


def time_side_by_side(
    works: Mapping[str, Mapping[str, Work]], clock: Clock, *, seconds: float, rounds: int, most_rounds: int = 200
) -> Timings:
    """Time every provider's works in rounds, in an order of providers that rotates.

    Args:
        works: provider -> name of the work -> work.
        clock: what times one.
        seconds: rounds go on for this long for each provider, preparation included,
        rounds: but there are at least so many,
        most_rounds: and at most so many.
    """
    timed: dict[str, dict[str, list[float]]] = {name: {what: [] for what in works[name]} for name in works}
    failed: dict[str, str] = {}
    begun = time.perf_counter()
    for i in range(most_rounds):
        names = [name for name in works if name not in failed]
        if not names or (i >= rounds and time.perf_counter() - begun >= seconds * len(names)):
            break
        # No provider always follows the same one, whose leavings in caches and allocator it would
        # inherit.
        first = i % len(names)
        for name in names[first:] + names[:first]:
            try:
                for what, work in works[name].items():
                    given = work.prepare()
                    timed[name][what] += clock(lambda work=work, given=given: work.call(given), seconds / rounds)  # type: ignore[misc]
                    del given
            except Exception as error:  # another library may raise anything; the others are still timed
                failed[name] = reason_of(error)
                release_memory()
    return Timings({name: timed[name] for name in works if name not in failed}, failed)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor did not fit, on a GPU or a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """An exception in one line for people."""
    if is_out_of_memory(error):
        return "it ran out of memory"
    return f"it failed with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def release_memory() -> None:
    """Hand what a GPU's allocator keeps unused back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- Memory ---------------------------------------------------------------------------------------


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
    """The most bytes that ``function`` and its result hold at once, beyond those before."""
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


# --- Roofline -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """What a device was measured to do."""

    copied: int
    """Bytes of the tensor that was copied."""
    bytes_per_second: float
    """Of its copy, reads and writes counted."""
    matrix_size: int
    flops_per_second: Mapping[str, float]
    """Of a matrix product, by the name of its dtype."""

    def bound(self, bytes_: float, flops: float | None = None, dtype: str = "") -> dict[str, Any]:
        """The least seconds that a piece of work takes.

        Args:
            bytes_: that it must move.
            flops: of its matrix products; None where it has none worth counting.
            dtype: theirs, one of those measured.

        Returns:
            Those for the "bytes" and the "flops" (or None), and the "bound", the larger of both.
        """
        by_bytes = bytes_ / self.bytes_per_second
        by_flops = None if flops is None else flops / self.flops_per_second[dtype]
        return {"bytes": by_bytes, "flops": by_flops, "bound": max(by_bytes, by_flops or 0.0)}

    def content(self) -> dict[str, Any]:
        """For a results file: "copy" and, where products were measured, "matrix"."""
        found: dict[str, Any] = {"copy": {"bytes": self.copied, "gb_per_second": self.bytes_per_second * 1e-9}}
        if self.flops_per_second:
            tflops = {name: rate * 1e-12 for name, rate in self.flops_per_second.items()}
            found["matrix"] = {"size": self.matrix_size, "tflops": tflops}
        return found


def measure_roofline(
    device: torch.device, clock: Clock, dtypes: Iterable[str], *, seconds: float, quick: bool
) -> Roofline:
    """Measure what a device can do.

    Args:
        device: which.
        clock: its clock.
        dtypes: whose matrix products to time; for kernels that have none, nothing.
        seconds: of measuring each, one at most.
        quick: tiny sizes, whose rates mean nothing.
    """
    cuda, seconds = device.type == "cuda", min(seconds, 1.0)
    copied = (4 << 20) if quick else (1 << 30) if cuda else (256 << 20)
    # Large enough that a GPU is busy from end to end; a CPU's cores are with far less.
    size = 128 if quick else 8192 if cuda else 1024

    def median(call: Callable[[], object]) -> float:
        timed = time_side_by_side({"": {"": Work(lambda _: call())}}, clock, seconds=seconds, rounds=3)
        return statistics.median(timed.seconds[""][""])

    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / median(lambda: target.copy_(source))
    rates = {}
    for name in dtypes:
        # Random numbers: a GPU's clock falls with the bits that change, and zeros are multiplied
        # faster.
        generator = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator, device=device).to(DTYPES[name]) for _ in range(2))
        out = torch.empty_like(a)
        rates[name] = 2 * size**3 / median(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))  # type: ignore[misc]
    return Roofline(copied, bandwidth, size, rates)
