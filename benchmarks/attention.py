"""Differential attention by every way there is to compute it: time, TFLOP/s and peak memory,
forward and backward.

    python -m benchmarks.attention                       # about four minutes on a GPU, two to three on two CPU cores
    python -m benchmarks.attention --all                 # on a GPU: every layout at 512 to 32K, and much longer
    python -m benchmarks.attention --quick               # a smoke test, with no meaning
    python -m benchmarks.attention --layouts v1_64 gda4_128 --lengths 4096 16384 --contenders triton two four

All is causal, and the tokens of all sequences together stay the same (16,384 on a GPU, 2,048 on a
CPU, or one longer sequence). Layouts are named for their kind, their D and their window: v1 is DIFF
V1, one noise head for each signal head; gda2 and gda4 are GDA with 2 and 4 signal heads for each
noise head, heads as in Motif-2-12.7B; both have values twice as wide as keys. v2 is DIFF V2: values
as wide as keys, the same keys for signal and noise, lambda for each token and head. A window of 128
is 128 keys for each query, its own included. Packed layouts are documents in one sequence, a fixed
mixture that is even over all magnitudes up to the length, many of them shorter than 512. On a CPU
there is an eighth of the heads.

Every contender computes the same function from the same inputs, from queries, keys and values to
the finished output and back to all gradients: the difference with lambda and, in DIFF V1 and GDA,
the sub-norm. Compositions take motif_kernels' diff_combine for that, the best there is for them;
the fused kernel does it by itself. Noise heads are never repeated.

Contenders:

    ours             motif_kernels' fused kernel (triton), in its deterministic and its other mode, and its backends
                     that compose: sdpa, and flash where flash-attn is installed
    two calls        torch's scaled_dot_product_attention for signal and for noise, values at their full width; where
                     a kernel needs equal widths keys are padded, where it has no grouped queries
                     keys are repeated
    four calls       the same with each call on one half of the values, as the papers' implementations do; DIFF V2's
                     values need no halves
    FlexAttention    compiled (not timed), its block mask made before, two calls; on a CPU its forward alone, for there
                     it has no backward. By default at one length of a few layouts: it compiles for
                     long
    naive formula    with maps in memory, where they fit

Two and four calls are measured with cuDNN and with flash attention; tables and picture show the
faster, the JSON file both. Windows and documents take torch's varlen_attn on a GPU
(the same flash attention), on a CPU a mask and a call for each document.

Right first: at its size, each contender's output and gradients are held to the plain formula in
float64 (float32 where that is too much work) on two slices: the first sequence and key head, and
the last, with all query heads that use it. The incoming gradient is 0 elsewhere, and so must the
gradients be. One that is off is refused by name, and not timed. One that runs out of memory is
reported, and the others go on.

TFLOP/s count the mathematics alone: for each visible pair of query and key and each group of g
signal heads and their noise head (g + 1)(2D + 2Dv) forward and g(6D + 4Dv) + 6D backward. What a
method computes beyond that, such as a second pass over the pairs, padding or hidden pairs, is no
work done. The floor, the least time for a direction, is that work at the rate of a large matrix
product, or every input, output and gradient moved once at the bandwidth of a large copy, both
measured in the same run: whichever is longer.

Time: contenders take turns, in an order that rotates; the figure is the median, and ± half the
width of the middle half. On a GPU it is the device's time with a cold L2 cache and the launches
queued (timing.py). Peak memory is the most that forward and backward hold at once, the inputs and
the incoming gradient included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import attention_report
from benchmarks.attention_check import Exact, Truth
from benchmarks.attention_contenders import CONTENDERS, OURS, Candidate, candidates, refusal, unavailable
from benchmarks.attention_problems import LAYOUTS, Problem, describe, problem
from benchmarks.kernels import DTYPES, Contender, device_slug, draw_from, fault, terminate_as_interrupt
from benchmarks.lib import report
from benchmarks.memory import peak_bytes
from benchmarks.timing import Clock, Limits, Timing, Work, clock_for, measure_limits, time_in_turns
from motifarch.errors import UserError

PACKAGES = ("motifarch", "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cudnn-cu12")
ALL_LENGTHS = [512 << i for i in range(7)]
CPU_LAYOUTS = ["v1_64", "gda4_128", "v2_64", "v1_64_w128", "v1_64_packed"]
QUICK_LAYOUTS = ["v1_64", "gda4_128_w128", "v2_64", "v1_64_packed"]

# Largest error of an element, relative to |exact| + the root mean square: several times what
# rounding does to gradients of attention, far below what a wrong mask, a wrong head or an element
# that nothing wrote would show.
TOLERANCES = {"float32": 1e-3, "bf16": 0.15}


class Checked:
    """A candidate that gave right numbers, and what is known of it."""

    def __init__(self, candidate: Candidate, form: str, contender: Contender, errors: Mapping[str, Any]):
        self.candidate, self.form, self.contender, self.errors = candidate, form, contender, errors
        self.peak: int | None = None

    def names(self) -> dict[str, str]:
        """What its results are filed under."""
        return {"contender": self.candidate.contender, "variant": self.candidate.variant, "form": self.form}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a tensor did not fit, on a GPU or a CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def reason_of(error: BaseException) -> str:
    """One line for people."""
    if is_out_of_memory(error):
        return "it ran out of memory"
    return f"it failed with {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def check(
    candidate: Candidate, inputs: Mapping[str, Tensor], exact: Truth, grad: Tensor, tolerance: float
) -> Checked | str:
    """Run a candidate's forms in turn until one runs, and hold its results to the exact ones.

    Returns:
        The candidate, ready to be timed with ``grad``, or why it is refused.
    """
    names, reason = list(inputs), "there is nothing to run"
    for form, function in candidate.forms:

        def of_tensors(*tensors: Tensor, function: Callable[..., Tensor] = function) -> Tensor:
            return function(dict(zip(names, tensors, strict=True)))

        tensors = list(inputs.values())
        trial = Contender(of_tensors, tensors, exact.grad, overwrites=False)
        try:
            results = trial.both() if "both" in candidate.directions else (trial.forward(),)
        except Exception as error:  # whatever a rival's library raises, the others are still measured
            # What a kernel without the right widths or heads says matters least; the last form is
            # the most modest.
            reason = reason_of(error)
            if is_out_of_memory(error):
                break
            continue
        found = dict(zip(("output", *names), (t.detach() for t in results), strict=False))
        errors = exact.errors(found)
        if wrong := fault(errors, tolerance):
            return wrong
        return Checked(candidate, form, Contender(of_tensors, tensors, grad, overwrites=False), errors)
    return reason


def time_all(
    checked: Sequence[Checked], clock: Clock, *, seconds: float, minimum: int, warmup: int
) -> tuple[list[tuple[Checked, dict[str, list[Timing]]]], list[Checked]]:
    """Time them in turns; one that runs out of memory is left out, and the others begin again.

    Returns:
        Timings by direction of those that could be timed, and those that ran out of memory.
    """
    running = 0

    def noted(i: int, work: Work) -> Work:
        def prepare() -> Any:
            nonlocal running
            running = i
            return work.prepare()

        return dataclasses.replace(work, prepare=prepare)

    left = dict(enumerate(checked))
    out_of_memory: list[Checked] = []
    while left:
        turns = {
            str(i): {d: noted(i, work) for d, work in c.contender.works().items() if d in c.candidate.directions}
            for i, c in left.items()
        }
        try:
            timings = time_in_turns(turns, clock, seconds=seconds, minimum=minimum, warmup=warmup)
            return [(c, timings[str(i)]) for i, c in left.items()], out_of_memory
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        out_of_memory.append(left.pop(running))
        _release()
    return [], out_of_memory


def _release() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    problem: Problem,
    names: Sequence[str],
    device: torch.device,
    clock: Clock,
    *,
    seconds: float,
    minimum: int,
    limits: Limits,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check, weigh and time the contenders on a problem.

    Returns:
        A result for each kernel of each contender that gave right numbers, and a refusal for each
        other.
    """
    draw = draw_from(0, DTYPES[problem.dtype], device)
    inputs = {name: tensor.requires_grad_() for name, tensor in problem.make(draw).items()}
    grad = draw(*problem.shape("output"))
    exact = Exact(problem, inputs, draw)
    refused = []

    def refuse(candidate: Candidate, form: str, reason: str) -> None:
        names = {"contender": candidate.contender, "variant": candidate.variant, "form": form}
        refused.append(problem.cell() | names | {"reason": reason})

    checked = []
    for candidate in candidates(problem, names, device):
        verdict = check(candidate, inputs, exact, grad, TOLERANCES[problem.dtype])
        if isinstance(verdict, str):
            refuse(candidate, "", verdict)
        else:
            checked.append(verdict)
        _release()
    del exact
    given = sum(t.nbytes for t in inputs.values()) + grad.nbytes
    for c in list(checked):
        if "both" in c.candidate.directions:
            try:
                c.peak = given + peak_bytes(c.contender.both, device)
            except Exception as error:
                refuse(c.candidate, c.form, reason_of(error))
                checked.remove(c)
                _release()
    timed, out_of_memory = time_all(
        checked, clock, seconds=seconds, minimum=minimum, warmup=2 if device.type == "cuda" else 1
    )
    for c in out_of_memory:
        refuse(c.candidate, c.form, "it ran out of memory")

    flops, moved, results = problem.flops(), problem.bytes_moved(), []
    floors = {d: limits.floor(moved[d], flops[d], problem.dtype) for d in flops}
    for c, timings in timed:
        spreads = {d: report.spread([t.seconds for t in timings[d]]) for d in timings}
        host = {d: statistics.median(t.host_seconds for t in timings[d]) for d in timings}
        results.append(
            problem.cell()
            | c.names()
            | {
                "pairs": problem.pairs,
                "flops": flops,
                "bytes": moved,
                "floor_seconds": {d: floor._asdict() for d, floor in floors.items()},
                "seconds": {d: spread._asdict() for d, spread in spreads.items()},
                "tflops": {d: flops[d] / spread.median * 1e-12 for d, spread in spreads.items()},
                "share_of_floor": {d: floors[d].floor / spread.median for d, spread in spreads.items()},
                "repetitions": len(timings["forward"]),
                **({"host_seconds": host} if device.type == "cuda" else {}),
                "peak_bytes": c.peak,
                "errors": c.errors,
            }
        )
    attention_report.mark_best(results)
    return results, refused


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.attention",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--layouts", nargs="+", choices=list(LAYOUTS), help=f"default: all, on a CPU {' '.join(CPU_LAYOUTS)}")
    add("--lengths", nargs="+", type=int, help="default: a few for each layout, on a CPU 512 2048")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, float32 and bf16 on a CPU")
    add("--contenders", nargs="+", choices=list(CONTENDERS), help="default: all that can run here")
    add("--all", action="store_true", help="all layouts, lengths of 512 to 32K, FlexAttention everywhere, no --limit")
    add("--tokens", type=int, help="of all sequences together; default 16384 on a GPU, 2048 on a CPU")
    add("--head-divisor", type=int, help="leave one of so many heads; default 1 on a GPU, 8 on a CPU")
    add(
        "--seconds", type=float, help="of measuring for each contender at each size; default 0.2 on a GPU, 0.5 on a CPU"
    )
    add("--limit", type=float, help="seconds after which no new size is begun; default 220 on a GPU, 160 on a CPU")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--output", type=Path, help="JSON file, a picture beside it; default benchmarks/results/attention_DEVICE.json")
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
    for name in ("lengths", "tokens", "head_divisor", "seconds", "limit", "threads"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    device = torch.device(arguments.device)
    cuda, quick, everything = device.type == "cuda", arguments.quick, arguments.all
    arguments.flex_everywhere = everything or "flex" in (arguments.contenders or ())
    if arguments.layouts is None:
        arguments.layouts = QUICK_LAYOUTS if quick else list(LAYOUTS) if cuda or everything else CPU_LAYOUTS
    if arguments.lengths is None:
        lengths = ALL_LENGTHS if everything else None if cuda else [512, 2048]
        arguments.lengths = [160] if quick else lengths
    arguments.dtypes = arguments.dtypes or (["bf16"] if cuda else list(DTYPES))
    arguments.tokens = arguments.tokens or (320 if quick else 16384 if cuda else 2048)
    arguments.head_divisor = arguments.head_divisor or (1 if cuda and not quick else 8)
    arguments.seconds = arguments.seconds or (0.02 if quick else 0.2 if cuda else 0.5)
    if arguments.limit is None and not everything:
        arguments.limit = 220.0 if cuda else 160.0
    torch.set_num_threads(arguments.threads)
    missing = unavailable(device)
    for name in arguments.contenders or ():
        if name in missing:
            raise UserError(f"--contenders {name}: {missing[name]}; leave it out")
    arguments.left_out = {} if arguments.contenders else missing
    arguments.contenders = arguments.contenders or [name for name in CONTENDERS if name not in missing]
    return device


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """What the (resolved) command line asks for, a layout after the other."""
    for name in arguments.layouts:
        for dtype in arguments.dtypes:
            for length in arguments.lengths or LAYOUTS[name].lengths:
                yield problem(name, dtype, length, tokens=arguments.tokens, head_divisor=arguments.head_divisor)


def choose(problem: Problem, arguments: argparse.Namespace, device: torch.device) -> dict[str, str | None]:
    """The contenders, each with the reason why it is not tried on a problem, or None."""
    reasons = {name: refusal(problem, name, device) for name in arguments.contenders}
    if "flex" in reasons and not arguments.flex_everywhere:
        lengths = arguments.lengths or problem.layout.lengths
        chosen = problem.layout.flex if device.type == "cuda" else problem.name == arguments.layouts[0]
        if not (chosen and problem.length == min(lengths, key=lambda n: abs(n - 4096))):
            reasons["flex"] = "it compiles for long: --contenders flex or --all measures it everywhere"
    return reasons


def run(arguments: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Measure what the (resolved) command line asks for and report; the JSON file is written anew
    after each size.

    Returns:
        The exit status: 1 if motif_kernels was refused anywhere, or if it was stopped before the
        end.
    """
    env = report.environment("benchmarks.attention", device, PACKAGES)
    if device.type == "cuda":
        env["cudnn"] = torch.backends.cudnn.version()
    console.print(report.describe(env), style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    for name, reason in arguments.left_out.items():
        console.print(f"{CONTENDERS[name]} is left out: {reason}", style="dim")
    runs, results = report.ROOT / "runs", report.RESULTS
    default = runs / "attention_quick.json" if arguments.quick else results / f"attention_{device_slug(device)}.json"
    path = arguments.output or default
    settings = ("seconds", "limit", "threads", "device", "quick", "tokens", "head_divisor")
    todo, clock = list(problems(arguments)), clock_for(device)
    dtypes = {name: DTYPES[name] for name in arguments.dtypes}
    limits = measure_limits(device, clock, dtypes, seconds=arguments.seconds, quick=arguments.quick)
    content: dict[str, Any] = {
        "benchmark": "attention",
        "format": 1,
        "complete": False,
        "environment": env,
        "settings": {name: getattr(arguments, name) for name in settings},
        "layouts": {n: dataclasses.asdict(LAYOUTS[n]) | {"label": describe(LAYOUTS[n])} for n in arguments.layouts},
        "contenders": {name: CONTENDERS[name] for name in arguments.contenders},
        "left_out": arguments.left_out,
        **limits.content(),
        "tolerances": TOLERANCES,
        "documents": {f"{p.name} {p.length}": p.documents for p in todo if p.documents},
        "results": [],
        "refused": [],
        "skipped": [],
        "not_begun": [],
        "aims": [],
    }
    begun = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), report.progress(console) as bar, terminate_as_interrupt():
        task = bar.add_task("", total=len(todo))
        for p in todo:
            if arguments.limit is not None and time.monotonic() - begun > arguments.limit:
                content["not_begun"].append(p.cell())
                continue
            bar.update(task, description=p.describe())
            if not console.is_terminal:  # a log file shows no bar while it moves
                console.print(p.describe())
            reasons = choose(p, arguments, device)
            names = [name for name, reason in reasons.items() if reason is None]
            minimum = 2 if arguments.quick else 5 if device.type == "cuda" else 3
            found, refused = measure(p, names, device, clock, seconds=arguments.seconds, minimum=minimum, limits=limits)
            content["results"] += found
            content["refused"] += refused
            content["skipped"] += [
                p.cell() | {"contender": name, "reason": reason} for name, reason in reasons.items() if reason
            ]
            report.write_json(path, content)
            bar.advance(task)
        content["complete"] = True
    if not content["complete"]:
        console.print("stopped: the figures so far follow", style="yellow")
    content["aims"] = [] if arguments.quick else attention_report.judge(content["results"], device)
    report.write_json(path, content)
    attention_report.print_results(console, content)
    console.print(f"figures: {path}", soft_wrap=True)
    if content["results"]:
        picture = path.with_suffix(".png")
        attention_report.draw(picture, content)
        console.print(f"picture: {picture}", soft_wrap=True)
    return int(not content["complete"] or any(r["contender"] in OURS for r in content["refused"]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments, resolve(arguments), Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
