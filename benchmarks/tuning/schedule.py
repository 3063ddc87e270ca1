"""In which order candidates are compiled and measured: breadth first, both side by side."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from benchmarks.tuning.kernels import Entry, Kernel, is_main

EAGERNESS = 3
"""Candidates of a main class that are tried for each of another."""
HOPELESS = 1.5
"""A candidate that is predicted to take so many times as long as the best predicted is not
measured.
"""
MARGIN = 0.98
"""A candidate replaces the present entry if it takes at most this part of its time: two
measurements of one differ by a per cent.
"""


class Verdict(NamedTuple):
    """What compiling says of a candidate."""

    predicted: float | None = None
    """Seconds that its kernel takes by the static model, where that has a say."""
    reason: str | None = None
    """Why it is not measured."""


@dataclass(eq=False)
class Size:
    """A kernel at a class of sizes: its candidates, the present entry first, and what is known."""

    kernel: Kernel
    up_to: int | None
    entries: Sequence[Entry]
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    ready: list[int] = field(default_factory=list)
    """Compiled, and not yet measured."""
    times: dict[int, list[float]] = field(default_factory=dict)
    """Candidate -> seconds of each case."""
    reasons: dict[int, str] = field(default_factory=dict)
    """Candidate -> why it is left out."""
    chosen: int | None = None
    confirming: bool = False

    @property
    def is_main(self) -> bool:
        """Whether models have such sizes most."""
        return is_main(self.kernel.name, self.up_to)

    @property
    def best(self) -> int | None:
        """The fastest that is not left out; the present entry, unless one is faster by a margin."""
        means = {i: statistics.geometric_mean(t) for i, t in self.times.items() if i not in self.reasons}
        if 0 in means:
            means[0] *= MARGIN
        return min(means, key=lambda i: means[i], default=None)

    @property
    def speedup(self) -> float | None:
        """Of the choice over the present entry."""
        if self.chosen is None or 0 not in self.times:
            return None
        before, now = self.times[0], self.times[self.chosen]
        return statistics.geometric_mean(was / is_ for was, is_ in zip(before, now, strict=True))

    def take_next(self) -> int | None:
        """The candidate to measure: the present entry, then by predicted time. Hopeless ones are
        left out.
        """
        predicted = {i: v.predicted for i, v in self.verdicts.items() if v.predicted is not None}
        least = min(predicted.values(), default=0.0)
        for i in [i for i in self.ready if i and predicted.get(i, 0.0) > HOPELESS * least]:
            self.ready.remove(i)
            self.reasons[i] = f"predicted to take {predicted[i] / least:.1f} times as long as the best predicted"
        if not self.ready:
            return None
        i = min(self.ready, key=lambda i: (i != 0, predicted.get(i, float("inf")), i))
        self.ready.remove(i)
        return i

    def report(self) -> dict[str, Any]:
        """For the log."""
        cases = [shape.case.describe() for shape in self.kernel.classes[self.up_to][0]]
        results = [
            {"entry": dict(self.entries[i]), "case": case, "seconds": t, "predicted": self.verdicts[i].predicted}
            for i, times in self.times.items()
            for case, t in zip(cases, times, strict=True)
        ]
        return {
            "kernel": self.kernel.name,
            "up_to": self.up_to,
            "chosen": None if self.chosen is None else dict(self.entries[self.chosen]),
            "speedup": self.speedup,
            "results": results,
            "left_out": [{"entry": dict(self.entries[i]), "reason": r} for i, r in self.reasons.items()],
            "not_reached": len(self.entries) - len(self.times.keys() | self.reasons.keys()),
        }


class Bench(Protocol):
    """What :func:`explore` is given to do."""

    def compile(self, size: Size, entry: Entry, further: bool) -> Callable[[], Verdict | None]:
        """Begin to compile a candidate, for the timed or for the further cases; -> what asks for
        the verdict, None as long as there is none.
        """

    def measure(self, size: Size, entry: Entry) -> list[float] | str:
        """Seconds of each timed case, or why it is left out."""

    def fault(self, size: Size, entry: Entry) -> str | None:
        """Why it does not serve the further cases, or None."""

    def note(self, size: Size, i: int | None) -> None:
        """Something is known of a candidate, or (None) another one is chosen."""


def breadth_first(sizes: Iterable[Size]) -> list[tuple[Size, int]]:
    """The candidates in turns: a few of each main class, then one of each other, and again."""

    def turn(of: tuple[Size, int]) -> tuple[int, int]:
        size, i = of
        return (i // EAGERNESS, i % EAGERNESS) if size.is_main else (i + 1, -1)

    return sorted(((size, i) for size in sizes for i in range(len(size.entries))), key=turn)


def explore(sizes: Sequence[Size], bench: Bench, *, jobs: int, deadline: float) -> None:
    """Compile and measure until all is done or the time is over; nothing new begins afterwards.

    A candidate is chosen when it is the fastest and serves the further cases too, for which it is
    compiled once it is the fastest.

    Args:
        sizes: what to tune, the most important first.
        bench: what compiles and measures.
        jobs: compilations side by side.
        deadline: by time.monotonic().
    """
    waiting = breadth_first(sizes)[::-1]
    confirm: list[tuple[Size, int]] = []
    running: list[tuple[Size, int, bool, Callable[[], Verdict | None]]] = []

    def consider(size: Size) -> None:
        best = size.best
        if best is None or best == size.chosen or size.confirming:
            return
        if best == 0:  # it is in force anyway
            choose(size, 0)
        else:
            size.confirming = True
            confirm.append((size, best))

    def choose(size: Size, i: int) -> None:
        size.chosen = i
        bench.note(size, None)

    while time.monotonic() < deadline:
        while len(running) < jobs and (confirm or waiting):
            further = bool(confirm)
            size, i = confirm.pop(0) if further else waiting.pop()
            running.append((size, i, further, bench.compile(size, size.entries[i], further)))
        for task in list(running):
            size, i, further, ask = task
            verdict = ask()
            if verdict is None:
                continue
            running.remove(task)
            if not further:
                size.verdicts[i] = verdict
            reason = verdict.reason
            if further:
                reason = reason or bench.fault(size, size.entries[i])
                size.confirming = False
                if not reason:
                    choose(size, i)
            elif not reason or i == 0:  # the present entry is tried whatever is said of it
                size.ready.append(i)
                continue
            if reason:
                size.reasons[i] = reason
                bench.note(size, i)
            consider(size)
        tried = [size for size in sizes if size.ready]
        if tried:
            size = min(tried, key=lambda s: len(s.times) / (EAGERNESS if s.is_main else 1))  # the first, if equal
            next_one = size.take_next()
            if next_one is not None:
                found = bench.measure(size, size.entries[next_one])
                if isinstance(found, str):
                    size.reasons[next_one] = found
                else:
                    size.times[next_one] = found
                bench.note(size, next_one)
                consider(size)
        elif running:
            time.sleep(0.01)
        elif not waiting and not confirm:
            return
