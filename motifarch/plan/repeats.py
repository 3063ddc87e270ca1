"""A tall stack of layers, from the steps of two short ones.

Layers repeat: after the first ones, each group of `period` layers is as the group before it. What
such a group adds to a step is the same however many there are, so two short stacks, the second a
period taller, say what each further period adds. Sums are then exact but for Muon's sharing of
matrices, which is never quite even. So is the peak: along a row of equal layers memory grows or
shrinks by the same bytes, so it is highest at the row's first or last.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motifarch.plan.communication import Traffic
from motifarch.plan.dry_run import StepTrace
from motifarch.plan.memory import Place, Stretch

_AHEAD = 2
"""Neighbours that a layer's memory depends on: FSDP2 gathers ahead and reduces behind."""


@dataclass(frozen=True)
class Repeat:
    """How a stack is made of a shorter one."""

    layers: int
    """Of the shorter stack."""
    prefix: int
    """Of them, those before the first that repeats."""
    period: int
    """Layers after which the same ones come again."""
    times: int
    """Periods that the whole stack has more."""


def find_repeat(layers: Sequence[Hashable]) -> Repeat | None:
    """How to make a stack of two that have the fewest layers together; None where tracing these is
    no less work than tracing the whole.

    Args:
        layers: what each layer is; equal ones are interchangeable.
    """
    count = len(layers)
    found = []
    for period in range(1, count // 2 + 1):
        same = [layers[i] == layers[i + period] for i in range(count - period)]
        prefix = next((i + 1 for i in reversed(range(len(same))) if not same[i]), 0)
        least = prefix + _AHEAD + 1
        short = least + (count - least) % period
        if 2 * short + period < count:
            found.append(Repeat(short, prefix, period, (count - short) // period))
    return min(found, key=lambda repeat: 2 * repeat.layers + repeat.period, default=None)


def extrapolate(short: StepTrace, tall: StepTrace, repeat: Repeat) -> StepTrace:
    """The trace of a whole stack, from those of `repeat.layers` layers and of a period more."""

    def add(name: str) -> Any:
        return _further(getattr(short, name), getattr(tall, name), repeat.times)

    sums = ["parameters", "parameter_count", "gradients", "optimizer", "offloaded", "experts", "activations"]
    sums += ["flops", "moved"]
    return dataclasses.replace(
        tall,
        **{name: add(name) for name in sums},
        stretches=_stretches(short.stretches, tall.stretches, repeat),
        traffic=_traffic(short.traffic, tall.traffic, repeat.times),
    )


def _further(short: Any, tall: Any, times: int) -> Any:
    """The smaller and so many times the difference; of dictionaries, that of each value."""
    if isinstance(short, Mapping):
        keys = {**short, **tall}
        return {key: _further(short.get(key, 0), tall.get(key, 0), times) for key in keys}
    return short + times * (tall - short)


def _stretches(short: dict[Place, Stretch], tall: dict[Place, Stretch], repeat: Repeat) -> dict[Place, Stretch]:
    """Lower layers keep their number as the stack grows above them, upper ones their distance from
    its top. Each further period adds the same to all of either.
    """
    top, times = repeat.layers - 1, repeat.times - 1
    found = {}
    for (direction, batch, layer), stretch in tall.items():
        ways = {}  # the place in the whole stack, and a layer whose growth is known
        if layer < repeat.layers + repeat.period - _AHEAD:
            ways[layer] = min(layer, 0), 0
        if layer >= repeat.prefix + _AHEAD:
            ways[layer + times * repeat.period] = top, repeat.period
        for number, (known, shift) in ways.items():
            before, after = short[direction, batch, known], tall[direction, batch, known + shift]

            def grown(name: str, now: Stretch, before: Stretch = before, after: Stretch = after) -> dict[str, int]:
                sizes, low, high = (getattr(s, name) for s in (now, before, after))
                return {kind: size + times * (high[kind] - low[kind]) for kind, size in sizes.items()}

            found[direction, batch, number] = Stretch(grown("peak", stretch), grown("highest", stretch), stretch.phase)
    return found


def _traffic(short: list[Traffic], tall: list[Traffic], times: int) -> list[Traffic]:
    def key(t: Traffic) -> tuple[Any, ...]:
        return t.name, t.kind, t.ranks, t.link

    before = {key(t): t for t in short}
    found = []
    for t in tall:
        calls, sent = (before[key(t)].calls, before[key(t)].sent) if key(t) in before else (0.0, 0.0)
        found.append(dataclasses.replace(t, calls=_further(calls, t.calls, times), sent=_further(sent, t.sent, times)))
    return sorted(found, key=lambda t: -t.sent)
