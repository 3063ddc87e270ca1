"""The stateless sampler: (seed, step) -> which rows of which datasets make up the global batch."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from motifarch.data.batch_schedule import BatchSchedule
from motifarch.data.packed import Block
from motifarch.data.permutation import Permutation
from motifarch.errors import UserError

# Weights are held as whole parts of this unit, so that every sum below is exact.
_PARTS = 10**12
# A component whose next sample is not due within this many steps is never in a hurry.
_HORIZON = 2**40


class BlockDataset(Protocol):
    """What the sampler and the loader need of a dataset, such as a PackedDataset."""

    def __len__(self) -> int:
        """Number of rows."""

    def __getitem__(self, index: int) -> Block:
        """One row."""

    def document_lengths(self, index: int) -> np.ndarray:
        """That row's, without its tokens."""


@dataclass(frozen=True)
class MixtureComponent:
    """One dataset of a mixture."""

    dataset: BlockDataset
    weight: float = 1.0
    """Its share of the samples, relative to the other components' weights."""
    weight_end: float | None = None
    """The share at the end of the mixture's ramp (default: the same)."""


class Mixture:
    """Draws every global batch from weighted datasets, as a pure function of the seed and the step.

    The weights are normalised at both ends of the ramp and move linearly in between, one step at a
    time. The samples drawn from a component by any step never leave the floor and the ceiling of
    the integral of its weight (over samples): at each step, samples that are due are drawn, and the
    open places go to those due the soonest (earliest deadline first, which keeps within these
    bounds whenever anything can). Within a component, each epoch is a fresh pseudorandom
    permutation of its rows. Within a batch the components are shuffled.

    Nothing here grows with the datasets. The count of samples drawn so far, one number a component,
    is replayed from step 0 when a mixture is first asked for a late step (about 10 µs a step). It
    is what a checkpoint keeps of a mixture (`place`): where other batch sizes or weights go on from
    there, no sample is left out or drawn again.

    The seed names the order of everything. ``ramp_start`` is the last step with the components'
    starting weights, ``ramp_end`` the first with the final ones.

    Raises:
        UserError: an empty mixture or dataset, bad weights, or a ramp that does not go forwards.
    """

    def __init__(
        self,
        components: Sequence[MixtureComponent],
        *,
        seed: int,
        batch_schedule: BatchSchedule,
        ramp_start: int = 0,
        ramp_end: int = 0,
    ) -> None:
        self.components = list(components)
        self.seed = seed
        self.batch_schedule = batch_schedule
        if not self.components:
            raise UserError("the data mixture names no dataset: give at least one")
        self._sizes = [len(component.dataset) for component in self.components]
        for number, size in enumerate(self._sizes):
            if size < 1:
                raise UserError(f"dataset {number} of the mixture has no rows: prepare it again or leave it out")
        starts = [component.weight for component in self.components]
        ends = [c.weight if c.weight_end is None else c.weight_end for c in self.components]
        if not 0 <= ramp_start <= ramp_end:
            raise UserError(
                f"the mixture's weights move from step {ramp_start} to step {ramp_end}: "
                "the ramp must start at 0 or later and not end before it starts"
            )
        if starts != ends and ramp_start == ramp_end:
            raise UserError(
                f"the mixture has final weights {ends} but its ramp runs from step {ramp_start} to step {ramp_end}: "
                "set ramp_end to the step at which the final weights hold"
            )
        self._ramp = (ramp_start, ramp_end)
        self._start_parts = _parts(starts)
        self._end_parts = _parts(ends)
        # An integral of this size is one sample.
        self._unit = _PARTS * max(1, ramp_end - ramp_start)
        self._lock = threading.Lock()
        self._begin(0, [0] * len(self.components))

    def global_batch(self, step: int) -> list[tuple[int, int]]:
        """One step's batch as (component, row) pairs in order, whatever the ranks."""
        before, after = self._counts(step), self._counts(step + 1)
        samples: list[tuple[int, int]] = []
        for component, (begin, end) in enumerate(zip(before, after, strict=True)):
            samples += [(component, row) for row in self._rows(component, begin, end)]
        order = Permutation(len(samples), self.seed, "batch", step)(np.arange(len(samples)))
        return [samples[i] for i in order.tolist()]

    def place(self, step: int) -> dict[str, Any]:
        """The samples drawn from each component before ``step``, for `go_on`, as JSON holds it."""
        return {"drawn": self._counts(step), "since_step": self._start, "drawn_before": self._drawn_before}

    def go_on(self, step: int, place: dict[str, Any]) -> bool:
        """Goes on from ``step`` with the samples after those of a `place`.

        Returns:
            Whether batch sizes or weights have changed. If not, all is as if never interrupted.
        """
        self._begin(place["since_step"], place["drawn_before"])
        if self._counts(step) == place["drawn"]:
            return False
        self._begin(step, place["drawn"])
        return True

    def epochs(self, step: int) -> list[float]:
        """Passes made over each component by the batches before ``step``."""
        return [count / size for count, size in zip(self._counts(step), self._sizes, strict=True)]

    def weights(self, step: int) -> list[float]:
        """The normalised weights in force at ``step``."""
        begin, end = self._ramp
        progress = min(max(step - begin, 0), end - begin) / max(1, end - begin)
        return [(s + (e - s) * progress) / _PARTS for s, e in zip(self._start_parts, self._end_parts, strict=True)]

    def _rows(self, component: int, begin: int, end: int) -> list[int]:
        """Rows of a component's draws ``begin`` to ``end``, counted from the start of training."""
        size = self._sizes[component]
        rows: list[int] = []
        while begin < end:
            epoch, position = divmod(begin, size)
            stop = min(size, position + end - begin)
            rows += Permutation(size, self.seed, component, epoch)(np.arange(position, stop)).tolist()
            begin += stop - position
        return rows

    def _begin(self, step: int, counts: list[int]) -> None:
        """Lets weights and batch sizes hold from a step on, before which samples were drawn."""
        self._start = step
        self._drawn_before = list(counts)
        self._integrals_before = self._whole_integrals(step)
        self._replayed = {step: self._drawn_before}  # counts before it and before the last steps asked for

    def _counts(self, step: int) -> list[int]:
        """Samples drawn from each component by the batches before ``step``."""
        if len(self.components) == 1:
            samples = self.batch_schedule.samples_before
            return [self._drawn_before[0] + samples(step) - samples(self._start)]
        with self._lock:
            nearest = max(known for known in self._replayed if known <= step)
            counts = self._replayed[nearest]
            for passed in range(nearest, step):
                counts = self._advance(passed, counts)
            self._replayed = {self._start: self._drawn_before, nearest: self._replayed[nearest], step: counts}
            return counts

    def _advance(self, step: int, counts: list[int]) -> list[int]:
        due = self._integrals(step + 1)
        drawn = [max(count, integral // self._unit) for count, integral in zip(counts, due, strict=True)]
        places = self.batch_schedule.batch_size(step) + sum(counts) - sum(drawn)
        waiting = [c for c, integral in enumerate(due) if integral > drawn[c] * self._unit]
        if 0 < places < len(waiting):
            waiting.sort(key=lambda c: (self._deadline(c, drawn[c] + 1, step + 1), c))
        for component in waiting[:places]:
            drawn[component] += 1
        return drawn

    def _deadline(self, component: int, count: int, after: int) -> float:
        """The first step after ``after`` before which the integral reaches ``count``."""

        def reached(step: int) -> bool:
            return self._integrals(step)[component] >= count * self._unit

        if not reached(after + _HORIZON):
            return math.inf
        low, stride = after, 1
        while not reached(low + stride):
            low, stride = low + stride, 2 * stride
        high = low + stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high

    def _integrals(self, step: int) -> list[int]:
        """What each component owes before ``step``, times ``self._unit``: the samples drawn before
        the start, and its weight's integral over those since then.
        """
        owed = zip(self._whole_integrals(step), self._integrals_before, self._drawn_before, strict=True)
        return [now - before + drawn * self._unit for now, before, drawn in owed]

    def _whole_integrals(self, step: int) -> list[int]:
        """Each weight's integral over all samples before ``step``, times ``self._unit``."""
        begin, end = self._ramp
        samples, step_sum = self.batch_schedule.prefix_sums(step)
        ramped = 0  # the sum over earlier steps s of batch_size(s) * clip(s - begin, 0, end - begin)
        if step > begin < end:
            begin_samples, begin_sum = self.batch_schedule.prefix_sums(begin)
            if step <= end:
                ramped = step_sum - begin_sum - begin * (samples - begin_samples)
            else:
                end_samples, end_sum = self.batch_schedule.prefix_sums(end)
                ramped = end_sum - begin_sum - begin * (end_samples - begin_samples)
                ramped += (end - begin) * (samples - end_samples)
        base = samples * max(1, end - begin)
        return [s * base + (e - s) * ramped for s, e in zip(self._start_parts, self._end_parts, strict=True)]


def _parts(weights: list[float]) -> list[int]:
    """Weights as whole numbers that sum to ``_PARTS``."""
    total = sum(weights)
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not total > 0:
        raise UserError(f"mixture weights {weights}: they must be 0 or more, finite, and not all zero")
    bounds = [round(_PARTS * math.fsum(weights[:i]) / total) for i in range(len(weights))] + [_PARTS]
    return [high - low for low, high in pairwise(bounds)]
