"""Checking and timing the candidates of one class of sizes, for `benchmarks.tune`."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import report
from benchmarks.timing import Clock, Work, time_in_turns
from benchmarks.tune_candidates import BACKEND, Entry, Kernel, SizeClass
from benchmarks.tune_launch import Compilers, Table, entry_at, launcher, poisoned, reason_of, spilled_bytes, watched
from benchmarks.tune_problems import Problem
from motifarch.errors import UserError

SHORT_NAMES = {
    "block_m": "m",
    "block_n": "n",
    "num_warps": "warps",
    "num_stages": "stages",
    "tile_bytes": "bytes",
    "maxnreg": "registers",
    "backend": "",
}


def describe(entry: Entry, names: Mapping[str, str] | None = None) -> str:
    """An entry's fields, in one line; ``names`` has shorter names for some."""
    return ", ".join(f"{(names or {}).get(name, name)} {value}".strip() for name, value in entry.items())


def all_candidates(kernel: Kernel, size_class: SizeClass, table: Table) -> list[Entry]:
    """The entry that the class has now, then the other candidates."""
    present = entry_at(table[kernel.name], size_class.timed[0].size(kernel.name))
    return [present, *(c for c in size_class.candidates if c != present)]


def disagreement(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], tolerance: float) -> str | None:
    """Why results are refused, or None: every element must be finite and near the expected one."""
    for name, right in expected.items():
        result = found[name].float()
        if not result.isfinite().all():
            return f"its {name} is not finite everywhere"
        exact = right.float()
        error = (result - exact).abs()
        size = exact.abs() + exact.square().mean().sqrt() + torch.finfo(torch.float32).tiny
        if not (worst := (error / size).max().item()) <= tolerance:
            return (
                f"its {name} differs from the present entry's by up to {error.max().item():.3g} ({worst:.3g} relative "
                f"to the value and their root mean square; {tolerance:g} is allowed)"
            )
    return None


@dataclass
class Outcome:
    """What was found for a class of sizes."""

    chosen: Entry | None = None
    """None if no candidate passed."""
    seconds: float | None = None
    """Of the chosen entry, over all timed problems."""
    present_seconds: float | None = None
    speedup: float | None = None
    """Geometric mean over the problems of the present entry's time by the chosen one's."""
    results: list[dict[str, Any]] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Bench:
    """How candidates are measured."""

    device: torch.device
    clock: Clock
    seconds: float
    """For each candidate at each problem."""
    minimum: int
    say: Callable[[str], None]
    deadline: float = math.inf
    """By time.monotonic()."""
    compilers: Compilers | None = None

    def left(self) -> float | None:
        """Seconds until the deadline, or None if there is none."""
        return None if math.isinf(self.deadline) else max(0.0, self.deadline - time.monotonic())

    def attempt(
        self, kernel: Kernel, launch: Callable[[Entry], dict[str, Tensor]], entry: Entry, *, bounded: bool
    ) -> dict[str, Tensor] | str:
        """A candidate's results, or why it is refused; a present entry's spills are not bounded.

        Raises:
            UserError: the GPU cannot go on after this launch.
        """
        try:
            with watched() as launched, contextlib.nullcontext() if kernel.name == BACKEND else poisoned():
                results = launch(entry)
                self.synchronize()
        except Exception as error:  # whatever the compiler or the driver raises, the others are still measured
            try:
                self.synchronize()
            except RuntimeError as broken:
                raise UserError(
                    f"{kernel.name} with {describe(entry)} left the GPU unusable ({reason_of(broken)}); what was found "
                    "before is saved; leave this candidate out of benchmarks/tune_candidates.py"
                ) from broken
            return reason_of(error)
        spilled = spilled_bytes(launched)
        if bounded and kernel.name != BACKEND and spilled > kernel.spilled_bytes:
            return f"it spills {spilled} bytes a thread; {kernel.spilled_bytes} are allowed"
        return results

    def compile(
        self, kernel: Kernel, candidates: Sequence[Entry], problems: Sequence[Problem], table: Table
    ) -> list[tuple[Entry, Problem, str]]:
        """Compile side by side, where there are compilers; which candidates cannot be compiled for
        what, and why.

        Raises:
            OutOfTimeError: the deadline came first.
        """
        if self.compilers is None or kernel.name == BACKEND:
            return []
        pairs = [(entry, problem) for entry in candidates for problem in problems]
        tasks = [(kernel.name, problem, entry, table, self.device.type) for entry, problem in pairs]
        reasons = self.compilers.compile(tasks, self.left())
        return [(*pair, reason) for pair, reason in zip(pairs, reasons, strict=True) if reason is not None]

    def synchronize(self) -> None:
        """Wait for the GPU, and hear of what failed there."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def try_all(
        self, kernel: Kernel, problem: Problem, candidates: Sequence[Entry], present: Entry, table: Table
    ) -> tuple[Callable[[Entry], dict[str, Tensor]], list[Entry], list[tuple[Entry, str]]]:
        """Launch candidates and hold them to the first that runs: a launcher, those that passed,
        and those refused.
        """
        try:
            launch = launcher(kernel.name, problem, self.device, table)
        except Exception as error:  # a kernel that comes before this one cannot be launched
            reason = f"what comes before it cannot be run: {reason_of(error)}"
            return (lambda _: {}), [], [(entry, reason) for entry in candidates]
        passed: list[Entry] = []
        refused: list[tuple[Entry, str]] = []
        expected: dict[str, Tensor] | None = None
        for entry in candidates:
            found = self.attempt(kernel, launch, entry, bounded=entry != present)
            if not isinstance(found, str):
                wrong = disagreement(expected or found, found, kernel.tolerance)
                if wrong is None:
                    expected = expected or found
                    passed.append(entry)
                    continue
                found = wrong
            refused.append((entry, found))
        return launch, passed, refused

    def tune(self, kernel: Kernel, size_class: SizeClass, table: Table) -> Outcome:
        """Check and time a class's candidates.

        Raises:
            OutOfTimeError: the deadline came while they were compiling.
            UserError: the GPU cannot go on.
        """
        outcome = Outcome()
        candidates = all_candidates(kernel, size_class, table)
        present = candidates[0]
        times: dict[int, list[float]] = {i: [] for i in range(len(candidates))}

        def refuse(entry: Entry, problem: Problem, reason: str) -> None:
            outcome.refused.append({"entry": dict(entry), "problem": problem.describe(), "reason": reason})
            self.say(f"  refused: {describe(entry)} at {problem.describe()}: {reason}")
            times.pop(candidates.index(entry), None)

        for entry, problem, reason in self.compile(kernel, candidates, size_class.timed, table):
            refuse(entry, problem, reason)
        for problem in size_class.timed:
            left = [candidates[i] for i in times]
            launch, passed, refused = self.try_all(kernel, problem, left, present, table)
            for entry, reason in refused:
                refuse(entry, problem, reason)
            works = {
                str(candidates.index(e)): {"": Work(lambda _, launch=launch, e=e: launch(e))}  # type: ignore[misc]
                for e in passed
            }
            timings = time_in_turns(works, self.clock, seconds=self.seconds, minimum=self.minimum) if works else {}
            for label, of_work in timings.items():
                entry, values = candidates[int(label)], [t.seconds for t in of_work[""]]
                times[int(label)].append(statistics.median(values))
                outcome.results.append(
                    {
                        "entry": dict(entry),
                        "problem": problem.describe(),
                        "seconds": report.spread(values)._asdict(),
                        "repetitions": len(values),
                    }
                )
            del launch, works
        self._choose(outcome, kernel, size_class, candidates, times, table, refuse)
        return outcome

    def _choose(
        self,
        outcome: Outcome,
        kernel: Kernel,
        size_class: SizeClass,
        candidates: Sequence[Entry],
        times: dict[int, list[float]],
        table: Table,
        refuse: Callable[[Entry, Problem, str], None],
    ) -> None:
        """Fill in the fastest that serves the class's other problems too."""
        present, present_times = candidates[0], times.get(0)
        for i in sorted(times, key=lambda i: math.prod(times[i])):
            entry = candidates[i]
            # The present entry first, to compare with.
            tried = [present, entry] if i and present_times else [entry]
            uncompiled = self.compile(kernel, tried, size_class.also, table)
            failed = [(p, why) for e, p, why in uncompiled if e == entry]
            if any(e == present for e, _, _ in uncompiled):
                tried = [entry]
            for problem in size_class.also if not failed else ():
                _, _, refused = self.try_all(kernel, problem, tried, present, table)
                failed += [(problem, why) for e, why in refused if e == entry]
                if failed:
                    break
            if failed:
                refuse(entry, *failed[0])
            else:
                outcome.chosen, outcome.seconds = entry, sum(times[i])
                if present_times:
                    ratios = [was / now for was, now in zip(present_times, times[i], strict=True)]
                    outcome.present_seconds = sum(present_times)
                    outcome.speedup = statistics.geometric_mean(ratios)
                return
