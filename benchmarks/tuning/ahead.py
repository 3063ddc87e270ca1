"""Candidates compiled before they are measured, by processes of their own."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.lib.bench import reason_of
from benchmarks.lib.compile_pool import at_most, differentiated, draw_nothing
from benchmarks.lib.compiling import compile_only, launches_through
from benchmarks.tuning.candidates import TILED, Launched, predicted_seconds, spills
from benchmarks.tuning.kernels import BACKEND, Entry, Shape, all_kernels
from benchmarks.tuning.schedule import Verdict

LONGEST = 90.0
"""Seconds for a candidate on its cases."""


@contextlib.contextmanager
def as_asked_for(kernel: str) -> Iterator[list[Launched]]:
    """Within, a kernel is launched with its entry or not at all: with a stage of loads less it is
    another entry. The list gets all kernels that are launched.
    """
    from triton.runtime.errors import OutOfResources

    launched: list[Launched] = []

    def note(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        function = getattr(getattr(launch, "__self__", None), "fn", None)
        name = getattr(function, "__name__", "")
        try:
            compiled = launch(*args, **kwargs)
        except OutOfResources as error:
            if TILED.get(kernel) in (None, name):
                raise RuntimeError(str(error)) from error
            raise
        launched.append((name, compiled, kwargs))
        return compiled

    with launches_through(note):
        yield launched


def compile_candidate(
    kernel: str, up_to: int | None, entry: Entry, further: bool, architecture: int, gpu: str
) -> Verdict:
    """Compile a candidate into Triton's cache, on the timed or on the further cases.

    Args:
        kernel: as launch tables name it.
        up_to: the bound of its class of sizes.
        entry: the candidate.
        further: on the further cases.
        architecture: of the GPU, 90 for Hopper.
        gpu: its name, whose tables serve the other kernels.
    """
    of = all_kernels()[kernel]
    if kernel == BACKEND and entry["backend"] != "triton":
        return Verdict()
    predicted: list[float | None] = []
    try:
        with at_most(LONGEST):
            for shape in of.classes[up_to][further]:
                compiling = compile_only(architecture, gluon=of.gluon, read=False, gpu=gpu)
                with compiling, of.in_force(entry), as_asked_for(kernel) as launched:
                    launch(shape, entry)
                if kernel != BACKEND and spills(kernel, launched):
                    return Verdict(reason="it spills registers in an inner loop")
                try:
                    predicted.append(predicted_seconds(kernel, launched, shape.case))
                except Exception:  # a loop that the model does not know, or machine code alone, from a cache
                    predicted.append(None)
    except Exception as error:  # whatever a compiler raises, the others are still tried
        return Verdict(reason=f"compiling: {reason_of(error)}")
    known = [seconds for seconds in predicted if seconds is not None]
    return Verdict(predicted=statistics.geometric_mean(known) if known and len(known) == len(predicted) else None)


def launch(shape: Shape, entry: Entry) -> None:
    """A pass on tensors of a CPU, which compiles what it launches."""
    function, inputs = shape.function(torch.device("cpu"), entry), shape.case.make(draw_nothing)
    if "both" in shape.case.directions:
        differentiated(function, inputs)
    else:
        with torch.no_grad():
            function(inputs)
