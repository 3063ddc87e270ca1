"""A candidate on the GPU: are its results right, and how fast is it."""

import contextlib
import statistics
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.lib.bench import DTYPES, Clock, clock_of_kernels, cpu_clock, reason_of, release_memory
from benchmarks.lib.exact import Exact, exact_results, fault
from benchmarks.lib.measure import Trial
from benchmarks.lib.shapes import Case, draw_from
from benchmarks.tuning.ahead import as_asked_for
from benchmarks.tuning.kernels import Entry, Kernel, Shape
from motifarch.errors import UserError

SECONDS = 0.1
"""Of timing a case."""


def describe(entry: Entry) -> str:
    """An entry's fields, in one line."""
    return ", ".join(f"{name} {value}" for name, value in entry.items())


@dataclass
class Trials:
    """Runs candidates on one device, and keeps what the next one needs again."""

    device: torch.device
    kept: dict[Case, tuple[Mapping[str, Tensor], Exact]] = field(default_factory=dict)
    """Inputs and exact results."""

    def measure(
        self, kernel: Kernel, up_to: int | None, entry: Entry, others: Mapping[str, Entry]
    ) -> list[float] | str:
        """Seconds of each timed case, or why the entry does not serve."""
        seconds = []
        for shape in kernel.classes[up_to][0]:
            if reason := self.fault(kernel, shape, entry, others):
                return reason
            inputs, exact = self.given(shape)
            work = Trial(shape.function(self.device, entry), inputs, exact.grad).works()[kernel.direction]
            clock: Clock = clock_of_kernels if self.device.type == "cuda" else cpu_clock
            try:
                with kernel.in_force(entry, others):
                    prepared = work.prepare()
                    seconds.append(statistics.median(clock(lambda: work.call(prepared), SECONDS)))  # noqa: B023
            except Exception as error:  # out of memory, say
                return reason_of(error)
        return seconds

    def fault(self, kernel: Kernel, shape: Shape, entry: Entry, others: Mapping[str, Entry]) -> str | None:
        """Why an entry does not serve a case, or None if it launches with right results.

        Raises:
            UserError: the GPU cannot go on after this launch.
        """
        try:
            inputs, exact = self.given(shape)
            trial = Trial(shape.function(self.device, entry), inputs, exact.grad)
            with kernel.in_force(entry, others), as_asked_for(kernel.name), poisoned():
                results = trial.results()
                synchronize(self.device)
        except Exception as error:  # whatever the compiler or the driver raises, the others are still measured
            reason = reason_of(error)
            try:
                synchronize(self.device)
            except RuntimeError as broken:
                raise UserError(
                    f"{kernel.name} with {describe(entry)} left the GPU unusable ({reason_of(broken)}); what was found "
                    "before is saved; leave this candidate out of benchmarks.tuning.candidates"
                ) from broken
        else:
            reason = fault(exact.errors(results), kernel.tolerance) or ""
        return f"{reason} at {shape.case.describe()}" if reason else None

    def given(self, shape: Shape) -> tuple[Mapping[str, Tensor], Exact]:
        """A case's inputs and exact results; at most half of a GPU's memory is kept for the next
        time.
        """
        if shape.case not in self.kept:
            if self.device.type == "cuda":
                free, whole = torch.cuda.mem_get_info(self.device)
                while self.kept and free < whole // 2:
                    del self.kept[next(iter(self.kept))]
                    release_memory()
                    free, _ = torch.cuda.mem_get_info(self.device)
            draw = draw_from(0, DTYPES[shape.case.dtype], self.device)
            inputs = shape.case.make(draw)
            exact = exact_results(shape.case, inputs, draw)
            if exact.grad is not None:
                inputs = {name: t.requires_grad_() for name, t in inputs.items()}
            release_memory()
            self.kept[shape.case] = inputs, exact
        return self.kept[shape.case]


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, and hear of what failed there."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, new tensors hold NaN until they are written: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills new memory in this mode alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
