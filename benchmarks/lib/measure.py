"""Measure providers on a case: right first, then memory, then time, side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import report
from benchmarks.lib.bench import (
    DTYPES,
    Clock,
    Roofline,
    Work,
    host_seconds,
    is_out_of_memory,
    peak_bytes,
    reason_of,
    release_memory,
    saved_bytes,
    time_side_by_side,
)
from benchmarks.lib.exact import Exact, exact_results, fault
from benchmarks.lib.providers import Function, Provider
from benchmarks.lib.shapes import Case, draw_from

Row = dict[str, Any]


class Trial:
    """A provider's function on a case's inputs and one incoming gradient."""

    def __init__(
        self, function: Function, inputs: Mapping[str, Tensor], grad: Tensor | None = None, *, in_place: bool = False
    ):
        self._function, self._inputs, self._given = function, inputs, grad
        # One that writes its result over the incoming gradient gets its own.
        self.grad = grad.clone() if grad is not None and in_place else grad

    def forward(self, _: object = None) -> Tensor:
        """The output, ready for :meth:`backward`; without a gradient none is recorded."""
        if self.grad is not None:
            return self._function(self._inputs)
        with torch.no_grad():
            return self._function({name: t.detach() for name, t in self._inputs.items()})

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs; may be called again on the same output."""
        return torch.autograd.grad(out, list(self._inputs.values()), self.grad, retain_graph=True)

    def both(self, _: object = None) -> tuple[Tensor, ...]:
        """The output and the gradients of all inputs."""
        out = self.forward()
        return (out, *torch.autograd.grad(out, list(self._inputs.values()), self.grad))

    def results(self) -> dict[str, Tensor]:
        """By name: "output", and the gradient of each input."""
        found = self.both() if self.grad is not None else (self.forward(),)
        return {name: t.detach() for name, t in zip(("output", *self._inputs), found, strict=False)}

    def works(self) -> dict[str, Work]:
        """What to time, by direction."""
        if self.grad is None:
            return {"forward": Work(self.forward)}

        def restore() -> None:
            if self.grad is not self._given:
                self.grad.copy_(self._given)  # type: ignore[union-attr, arg-type]

        def prepare() -> Tensor:
            restore()
            return self.forward()

        return {
            "forward": Work(self.forward),
            "backward": Work(self.backward, prepare=prepare),
            "both": Work(self.both, prepare=restore),
        }


def check(
    provider: Provider, inputs: Mapping[str, Tensor], exact: Exact, tolerance: float
) -> tuple[str, Function, Mapping[str, Any]] | str:
    """Run a provider's forms in turn until one runs, and hold its results to the exact ones.

    Returns:
        The form that ran with its function and errors, or why the provider is not measured.
    """
    reason = "there is nothing to run"
    for form, function in provider.forms:
        try:
            grad = exact.grad if "both" in provider.directions else None
            results = Trial(function, inputs, grad, in_place=provider.in_place).results()
        except Exception as error:  # whatever another library raises, the others are still measured
            # What a kernel says without the right widths or heads matters least; the last form is
            # the most modest.
            reason = reason_of(error)
            if is_out_of_memory(error):
                break
            continue
        errors = exact.errors(results)
        return fault(errors, tolerance) or (form, function, errors)
    return reason


def measure(
    case: Case,
    providers: Sequence[Provider],
    device: torch.device,
    clock: Clock,
    roofline: Roofline,
    *,
    tolerance: float,
    seconds: float,
    rounds: int,
) -> tuple[list[Row], list[Row]]:
    """Check, weigh and time providers on a case.

    Returns:
        A result for each kernel of each provider that gave right numbers, and for each other the
        reason. "best" marks each provider's fastest kernel.
    """
    if not providers:
        return [], []
    draw = draw_from(0, DTYPES[case.dtype], device)
    inputs = case.make(draw)
    exact = exact_results(case, inputs, draw)
    if exact.grad is not None:
        inputs = {name: t.requires_grad_() for name, t in inputs.items()}
    grad = None if exact.grad is None else draw(*exact.grad.shape)
    given = sum(t.nbytes for t in inputs.values()) + (0 if grad is None else grad.nbytes)
    failed: list[Row] = []
    rows: list[Row] = []
    trials: list[Trial] = []

    def fail(row: Row, reason: str) -> None:
        failed.append(row | {"reason": reason})
        release_memory()

    for provider in providers:
        row = case.cell() | provider.label() | {"form": ""}
        verdict = check(provider, inputs, exact, tolerance)
        if isinstance(verdict, str):
            fail(row, verdict)
            continue
        row["form"], function, row["errors"] = verdict
        trial = Trial(function, inputs, grad if "both" in provider.directions else None, in_place=provider.in_place)
        row["peak_bytes"] = row["saved_bytes"] = None
        if trial.grad is not None:
            try:
                row["peak_bytes"] = given + peak_bytes(trial.both, device)
                row["saved_bytes"] = saved_bytes(trial.forward, inputs.values())
            except Exception as error:
                fail(row, reason_of(error))
                continue
        rows.append(row)
        trials.append(trial)
    del exact
    release_memory()
    works = {str(i): trial.works() for i, trial in enumerate(trials)}
    timed = time_side_by_side(works, clock, seconds=seconds, rounds=rounds)
    for i, reason in timed.failed.items():
        fail({name: rows[int(i)][name] for name in (*case.cell(), "provider", "variant", "form")}, reason)
    results = [rows[int(i)] | rates(case, of_direction, roofline) for i, of_direction in timed.seconds.items()]
    if device.type == "cuda":
        for i, result in zip(timed.seconds, results, strict=True):
            prepared = {d: (work, work.prepare()) for d, work in works[i].items()}
            result["host_seconds"] = {
                d: host_seconds(lambda work=work, given=given: work.call(given))  # type: ignore[misc]
                for d, (work, given) in prepared.items()
            }
    for r in results:
        r["best"] = seconds_of(r) == min(seconds_of(other) for other in results if other["provider"] == r["provider"])
    return results, failed


def rates(case: Case, timings: Mapping[str, Sequence[float]], roofline: Roofline) -> Row:
    """A result's bandwidth, FLOP/s, roofline, and the share of each that was reached."""
    spreads = {d: report.spread(values) for d, values in timings.items()}
    moved, flops = case.bytes_moved(), case.flops()
    bounds = {d: roofline.bound(moved[d], flops[d] if flops else None, case.dtype) for d in spreads}
    found: Row = {
        "bytes": {d: moved[d] for d in spreads},
        "seconds": {d: spread._asdict() for d, spread in spreads.items()},
        "repetitions": len(next(iter(timings.values()))),
        "gb_per_second": {d: moved[d] / s.median * 1e-9 for d, s in spreads.items()},
        "copy_share": {d: moved[d] / s.median / roofline.bytes_per_second for d, s in spreads.items()},
        "roofline_seconds": {d: bounds[d] for d in spreads},
        "share_of_roofline": {d: bounds[d]["bound"] / s.median for d, s in spreads.items()},
    }
    if flops is not None:
        found["flops"] = {d: flops[d] for d in spreads}
        found["tflops"] = {d: flops[d] / s.median * 1e-12 for d, s in spreads.items()}
    return found


def seconds_of(result: Mapping[str, Any]) -> float:
    """The median of forward and backward together, or of the forward where it is alone."""
    seconds = result["seconds"]
    return float(seconds.get("both", seconds["forward"])["median"])
