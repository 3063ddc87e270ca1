"""What the benchmarks of memory-bound kernels share: contenders held to float64, timed, weighed and
judged.

Contenders: *eager* is the plain formula, float32 arithmetic and one rounding at the end; *compile*
is torch.compile of that same function, static shapes; *liger* is liger-kernel, on a GPU and where
it is installed; *ours* is motif_kernels.

*Right first.* Before it is timed, every contender's output and gradients are held to the formula in
float64. One that is off is refused by name, reported, and not timed.

*Time.* Contenders take turns, in an order that rotates. A turn is a forward, a backward of a fresh
forward, and both together, each timed by itself; inputs require gradients, as in training. The
figure is the median, with quartiles. On a GPU it is the device's time with a cold L2 cache and the
launches queued (timing.py); the host's time to launch is kept beside it in the JSON.

*GB/s* is over the bytes that the mathematics must move: each input read once and each result
written once, parameters of a row's length or less left out. The share is of the bandwidth of a
large copy, measured in the same run; on a CPU, tensors that fit its caches may go beyond it. It is
also the share of the floor, the least time that the bytes take at that bandwidth: the arithmetic is
a few vector operations an element, without a matrix product, and has no floor of its own worth
telling.

*Memory.* Saved: the storages that autograd keeps for the backward, in all and beyond the inputs.
Peak: the most that a forward and backward hold at once, the inputs and the incoming gradient
included, by the allocator's own count.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import re
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import kernel_report
from benchmarks.kernel_report import DIRECTIONS
from benchmarks.lib import report
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.timing import Clock, Work, clock_for, measure_limits, time_in_turns
from motifarch.errors import UserError

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
CONTENDERS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "liger": "liger-kernel",
    "ours": "motif_kernels",
}
PACKAGES = ("motifarch", "torch", "triton", "liger-kernel")

# Largest error of an element, relative to |exact| + the root mean square: an order above what
# rounding does, liger's powers in bf16 included, and far below what a wrong formula or an element
# that nothing wrote would show.
TOLERANCES = {"float32": 1e-3, "bf16": 6e-2}

Draw = Callable[..., Tensor]
"""``draw(*shape, dtype=None)``: normal random numbers, in the problem's dtype or the one given."""


@dataclass(frozen=True)
class Problem:
    """One function at one size.

    Tensors of two or more dimensions have a row (a token) for each index of the first; others are
    parameters.
    """

    function: str
    dtype: str
    rows: int
    columns: int
    """Elements of a row."""
    forward_bytes: int
    backward_bytes: int
    make: Callable[[Draw], dict[str, Tensor]]
    """The inputs; the output is like the first of them."""
    formula: Callable[..., Tensor]
    """The plain formula, of the inputs in order; in float64 where they are."""
    ours: Callable[..., Tensor]
    liger: Callable[..., Tensor] | None = None
    liger_overwrites_gradient: bool = False

    def bytes_moved(self) -> dict[str, int]:
        """The least bytes that each direction moves."""
        both = self.forward_bytes + self.backward_bytes
        return dict(zip(DIRECTIONS, (self.forward_bytes, self.backward_bytes, both), strict=True))

    def describe(self) -> str:
        """In words."""
        return f"{self.function}, {self.dtype}, {self.rows:,} x {self.columns:,}"


class Contender:
    """A function on a problem's tensors."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor, overwrites: bool):
        self.function, self.inputs = function, list(inputs)
        self._given = grad
        # One that writes its result over the incoming gradient gets its own, restored before each
        # repetition.
        self.grad = grad.clone() if overwrites else grad

    def forward(self, _: object = None) -> Tensor:
        """The output, ready for :meth:`backward`."""
        return self.function(*self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all inputs."""
        return torch.autograd.grad(out, self.inputs, self.grad)

    def both(self, _: object = None) -> tuple[Tensor, ...]:
        """The output and the gradients."""
        out = self.forward()
        return (out, *self.backward(out))

    def restore(self) -> None:
        """Give it the incoming gradient that the others have."""
        if self.grad is not self._given:
            self.grad.copy_(self._given)

    def works(self) -> dict[str, Work]:
        """What to time, by direction."""

        def forward_and_restore() -> Tensor:
            self.restore()
            return self.forward()

        return {
            "forward": Work(self.forward),
            "backward": Work(self.backward, prepare=forward_and_restore),
            "both": Work(self.both, prepare=self.restore),
        }


def draw_from(seed: int, dtype: torch.dtype, device: torch.device) -> Draw:
    """A source of random tensors for :attr:`Problem.make`."""
    generator = torch.Generator(device).manual_seed(seed)
    standard = dtype

    def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype or standard)

    return draw


def errors_of(
    formula: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    grad: Tensor,
    results: Mapping[str, Sequence[Tensor]],
) -> dict[str, dict[str, dict[str, float]]]:
    """Hold outputs and gradients to the formula in float64, a block of rows at a time.

    Args:
        formula: as in :class:`Problem`.
        inputs: its inputs, in order.
        grad: the incoming gradient, like the output.
        results: contender -> the output, then the gradient of each input.

    Returns:
        contender -> "output" or an input's name -> "largest" error, and the largest "relative" to
        |exact| + root mean square of the exact values (of the block of rows).
    """
    names = ("output", *inputs)
    errors = {c: {name: {"largest": 0.0, "relative": 0.0} for name in names} for c in results}

    def compare(index: int, exact: Tensor, rows: slice | None) -> None:
        size = exact.abs() + exact.square().mean().sqrt() + torch.finfo(torch.float64).tiny
        for contender, tensors in results.items():
            found = tensors[index] if rows is None else tensors[index][rows]
            error = (found.double() - exact).abs()
            kept = errors[contender][names[index]]
            for key, value in (("largest", error.max().item()), ("relative", (error / size).max().item())):
                kept[key] = value if math.isnan(value) else max(value, kept[key])

    sums: dict[int, Tensor] = {}
    step = max(1, (1 << 22) * len(grad) // grad.numel())
    for start in range(0, len(grad), step):
        rows = slice(start, start + step)
        exact_inputs = [(t[rows] if t.ndim > 1 else t).detach().double().requires_grad_() for t in inputs.values()]
        out = formula(*exact_inputs)
        gradients = torch.autograd.grad(out, exact_inputs, grad[rows].double())
        compare(0, out.detach(), rows)
        for i, gradient in enumerate(gradients, start=1):
            if exact_inputs[i - 1].ndim > 1:
                compare(i, gradient, rows)
            else:
                sums[i] = sums[i] + gradient if i in sums else gradient
    for i, total in sums.items():
        compare(i, total, None)
    return errors


def fault(errors: Mapping[str, Mapping[str, float]], tolerance: float) -> str | None:
    """Why results with these errors are refused, or None if they pass; NaN never passes."""
    for name, error in errors.items():
        if not error["relative"] <= tolerance:
            what = "output" if name == "output" else f"gradient of {name}"
            return (
                f"its {what} is off by {error['largest']:.3g} ({error['relative']:.3g} relative to the exact value and "
                f"their root mean square; {tolerance:g} is allowed)"
            )
    return None


def functions_of(problem: Problem, names: Iterable[str]) -> dict[str, Callable[..., Tensor]]:
    """The contenders' functions for a problem; those that cannot do it are left out."""
    torch.compiler.reset()  # else the shapes of earlier problems make it compile for shapes of any size
    functions: dict[str, Callable[..., Tensor] | None] = {
        "eager": problem.formula,
        "compile": torch.compile(problem.formula, dynamic=False),
        "liger": problem.liger,
        "ours": problem.ours,
    }
    return {name: function for name in names if (function := functions[name]) is not None}


def measure(
    problem: Problem, names: Iterable[str], device: torch.device, clock: Clock, *, seconds: float, minimum: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check, weigh and time the contenders on a problem.

    Returns:
        A result for each contender that gave right numbers, without GB/s yet, and a refusal for
        each other.
    """
    draw = draw_from(0, DTYPES[problem.dtype], device)
    inputs = {name: tensor.requires_grad_() for name, tensor in problem.make(draw).items()}
    first = next(iter(inputs.values()))
    grad = draw(*first.shape)
    cell = {"function": problem.function, "dtype": problem.dtype, "rows": problem.rows, "columns": problem.columns}

    contenders: dict[str, Contender] = {}
    outcomes: dict[str, tuple[Tensor, ...]] = {}
    refused = []
    for name, function in functions_of(problem, names).items():
        contender = Contender(
            function, list(inputs.values()), grad, name == "liger" and problem.liger_overwrites_gradient
        )
        try:
            outcomes[name] = tuple(t.detach() for t in contender.both())
            contenders[name] = contender
        except Exception as error:  # whatever a rival's compiler raises, the others are still measured
            reason = (str(error).strip() or "no message").splitlines()[0]
            refused.append(cell | {"contender": name, "reason": f"it failed with {type(error).__name__}: {reason}"})
    errors = errors_of(problem.formula, inputs, grad, outcomes)
    outcomes.clear()
    for name in list(contenders):
        contenders[name].restore()
        if wrong := fault(errors[name], TOLERANCES[problem.dtype]):
            refused.append(cell | {"contender": name, "reason": wrong})
            del contenders[name]
    if not contenders:
        return [], refused

    given = sum(t.nbytes for t in inputs.values()) + grad.nbytes
    saved = {name: saved_bytes(c.forward, c.inputs) for name, c in contenders.items()}
    peaks = {name: given + peak_bytes(c.both, device) for name, c in contenders.items()}
    for contender in contenders.values():
        contender.restore()
    timings = time_in_turns(
        {name: c.works() for name, c in contenders.items()},
        clock,
        seconds=seconds,
        minimum=minimum,
        warmup=3 if device.type == "cuda" else 1,
    )
    results = []
    for name in contenders:
        of_direction = {d: [t.seconds for t in timings[name][d]] for d in DIRECTIONS}
        host = {d: statistics.median(t.host_seconds for t in timings[name][d]) for d in DIRECTIONS}
        results.append(
            cell
            | {
                "contender": name,
                "bytes": problem.bytes_moved(),
                "seconds": {d: report.spread(values)._asdict() for d, values in of_direction.items()},
                "repetitions": len(of_direction["forward"]),
                **({"host_seconds": host} if device.type == "cuda" else {}),
                "saved_bytes": saved[name],
                "peak_bytes": peaks[name],
                "errors": errors[name],
            }
        )
    return results, refused


def device_slug(device: torch.device) -> str:
    """The device for a file's name: cpu, nvidia_h100 or nvidia_h100_pcie, without memory sizes."""
    if device.type != "cuda":
        return device.type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "_".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\d\w*", word))


def parser(benchmark: str, doc: str | None, *, rows: str, columns: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks of kernels have.

    Args:
        benchmark: its name, as in ``python -m benchmarks.NAME``.
        doc: its module's docstring: the first paragraph is the summary, the rest stands below the
            options.
        rows: the default, in words.
        columns: likewise.
    """
    summary, _, counted = (doc or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}",
        description=summary,
        epilog=counted + "\n" + (__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--rows", type=int, help=f"rows (tokens); default {rows}")
    add("--columns", nargs="+", type=int, help=f"elements of a row; default {columns}")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, float32 and bf16 on a CPU")
    add("--contenders", nargs="+", choices=list(CONTENDERS), help="default: all that can run here")
    add("--seconds", type=float, help="of measuring for each contender at each size; default 0.4 on a GPU, 1 on a CPU")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--output", type=Path, help="JSON file, a picture beside it; default benchmarks/results/NAME_DEVICE.json")
    add("--quick", action="store_true", help="tiny sizes, a smoke test; writes to runs/ unless told otherwise")
    return made


def resolve(arguments: argparse.Namespace) -> torch.device:
    """Fill in the defaults that depend on the device, and check.

    Raises:
        UserError: an option has no meaning or cannot be had here.
    """
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    device = torch.device(arguments.device)
    for name in ("rows", "columns", "threads", "seconds"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; it must be above 0")
    cuda = device.type == "cuda"
    arguments.dtypes = arguments.dtypes or (["bf16"] if cuda else list(DTYPES))
    arguments.seconds = arguments.seconds or (0.02 if arguments.quick else 0.4 if cuda else 1.0)
    torch.set_num_threads(arguments.threads)
    missing: str | None = "liger-kernel has no CPU path"
    if cuda:
        missing = None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"
    if arguments.contenders is None:
        arguments.contenders = [name for name in CONTENDERS if name != "liger" or not missing]
    elif "liger" in arguments.contenders and missing:
        raise UserError(f"--contenders liger: {missing}; leave it out")
    arguments.left_out = {} if "liger" in arguments.contenders or not missing else {"liger": missing}
    return device


def run(
    benchmark: str,
    problems: Iterable[Problem],
    arguments: argparse.Namespace,
    device: torch.device,
    console: Console,
) -> int:
    """Measure all problems and report; the JSON file is written anew after each of them.

    Args:
        benchmark: its name, as in ``python -m benchmarks.NAME``.
        problems: what to measure, in order.
        arguments: of :func:`parser`, resolved.
        device: where to.
        console: what to print to.

    Returns:
        The exit status: 1 if our own function was refused anywhere, or if it was stopped before the
        end.
    """
    module, problems = f"benchmarks.{benchmark}", list(problems)
    env = report.environment(module, device, PACKAGES)
    console.print(report.describe(env), style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    for name, reason in arguments.left_out.items():
        console.print(f"{CONTENDERS[name]} is left out: {reason}", style="dim")
    default = report.RESULTS / f"{benchmark}_{device_slug(device)}.json"
    path = arguments.output or (report.ROOT / "runs" / f"{benchmark}_quick.json" if arguments.quick else default)

    clock = clock_for(device)
    limits = measure_limits(device, clock, {}, seconds=arguments.seconds, quick=arguments.quick)
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "format": 1,
        "complete": False,
        "environment": env,
        "settings": {name: getattr(arguments, name) for name in ("seconds", "threads", "device", "quick")},
        "contenders": {name: CONTENDERS[name] for name in arguments.contenders},
        "left_out": arguments.left_out,
        **limits.content(),
        "tolerances": TOLERANCES,
        "results": [],
        "refused": [],
        "aims": [],
    }
    try:
        with report.progress(console) as bar, terminate_as_interrupt():
            task = bar.add_task("", total=len(problems))
            for problem in problems:
                bar.update(task, description=problem.describe())
                if not console.is_terminal:  # a log file shows no bar while it moves
                    console.print(problem.describe())
                results, refused = measure(
                    problem,
                    arguments.contenders,
                    device,
                    clock,
                    seconds=arguments.seconds,
                    minimum=2 if arguments.quick else 5,
                )
                for result in results:
                    kernel_report.add_rates(result, limits)
                content["results"] += results
                content["refused"] += refused
                report.write_json(path, content)
                bar.advance(task)
        content["complete"] = True
    except KeyboardInterrupt:
        console.print("stopped: the figures so far follow", style="yellow")
    content["aims"] = [] if arguments.quick else kernel_report.judge(content["results"], device)
    report.write_json(path, content)
    kernel_report.print_results(console, content, CONTENDERS)
    console.print(f"figures: {path}", soft_wrap=True)
    if content["results"]:
        picture = path.with_suffix(".png")
        kernel_report.draw(picture, content, CONTENDERS)
        console.print(f"picture: {picture}", soft_wrap=True)
    return int(not content["complete"] or any(r["contender"] == "ours" for r in content["refused"]))


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """A time limit's SIGTERM ends the measuring as ctrl-C does, with tables and picture of what
    there is.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
