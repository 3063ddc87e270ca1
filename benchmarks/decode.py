"""Decoding against a key/value cache: the kernel beside what there was, and generate beside
DiffLlama and Llama.

    python -m benchmarks.decode                          # kernels on a GPU, a minute; generate on a CPU, some eight
    python -m benchmarks.decode --parts kernel generate  # both, wherever it runs
    python -m benchmarks.decode --quick                  # a smoke test, with no meaning
    python -m benchmarks.decode --batches 1 8 --contexts 131072 --contenders triton two one
    python -m benchmarks.decode --parts generate --cells float32:8x512 --cache dynamic

*Kernel.* One new token for each row, all rows' caches full. Layouts are attention.py's: gda4_128 is
GDA 4:1 with the heads of Motif-2-12.7B (32 signal, 8 noise, 8 pairs of keys of 128, 8 values of
256), v1_64 is DIFF V1 with 16 pairs of heads of 64. The cache lies as the layers keep it, k1 and k2
side by side. What does not fit the memory is skipped. Contenders, all from queries and caches to
the finished output:

    ours             diff_attn_with_kvcache: the Triton kernel, on a CPU the sdpa backend
    four calls       softmax attention for signal and for noise, each for both halves of the values, as the papers' code
    two calls        values at their full width; a kernel that wants keys as wide as values gets both keys side by side
                     and queries with zeros where the other's are, which copies nothing
    one call         signal and noise queries together in that way, as heads of one call
    FlexAttention    compiled (not timed), two calls; only where it is named, for it compiles for long

Calls are made with every kernel there is: torch's cuDNN, flash and memory-efficient ones, and
flash-attn 2, 3 and 4 where they are installed. Tables and picture show the fastest, the JSON file
all. Right first: at its size, each contender's output is held to the plain formula in float64; one
that is off is refused by name, and not timed.

GB/s is over the bytes that must be read: each cached key and value once. What a method reads beyond
that is no work done. The share is of the bandwidth of a large copy, reads and writes counted,
measured in the same run. The floor is the least time that those bytes take, or the products of
queries, keys and values at the rate of a large matrix product: whichever is longer.

Time: contenders take turns, in an order that rotates; the figure is the median, and ± half the
width of the middle half. On a GPU it is the device's time with a cold L2 cache and the launches
queued (timing.py).

*Generate.* transformers' generate, greedy, a fixed number of new tokens, random weights and
prompts; models of equal hidden size, layers and head width with equal numbers of parameters to 3%
(contenders.py). The prompt is in the cache before the clock starts: each call gets a copy of it,
and its time is new tokens alone. Nobody is compiled. Models take turns, a call each; tokens per
second are of all rows together, the median with the middle half beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import attention_report, decode_report
from benchmarks.attention import TOLERANCES, Checked, check, is_out_of_memory, reason_of, time_all
from benchmarks.attention_contenders import Candidate
from benchmarks.attention_problems import LAYOUTS, describe
from benchmarks.contenders import CONTENDERS as MODELS
from benchmarks.contenders import Sizes, match_parameters
from benchmarks.decode_contenders import CONTENDERS, OURS, candidates, flash_attn_libraries, unavailable
from benchmarks.decode_generate import CACHES, CPU_CELLS, QUICK_CELLS, Cell, Setup, measure_all
from benchmarks.decode_generate import MODELS as DEFAULT_MODELS
from benchmarks.decode_generate import judge as judge_generate
from benchmarks.decode_problems import DECODED, Decoding, Exact, decoding, too_large
from benchmarks.kernels import DTYPES, device_slug, terminate_as_interrupt
from benchmarks.lib import report
from benchmarks.timing import Clock, Limits, clock_for, measure_limits
from motifarch.environment import physical_memory
from motifarch.errors import UserError

PACKAGES = ("motifarch", "torch", "transformers", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")
PARTS = ("kernel", "generate")
SETTINGS = ("parts", "seconds", "limit", "threads", "device", "quick", "head_divisor", "new_tokens", "rounds", "cache")


def free_memory(device: torch.device) -> int:
    """Bytes that a problem may take: nine tenths of what a GPU has free, half of a machine's memory
    on a CPU.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0] * 9 // 10
    return (physical_memory() or 8 << 30) // 2


def measure(
    problem: Decoding,
    names: Sequence[str],
    device: torch.device,
    clock: Clock,
    *,
    seconds: float,
    minimum: int,
    limits: Limits,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Check and time the contenders on a problem.

    Args:
        problem: what to decode.
        names: the contenders.
        device: where.
        clock: its clock.
        seconds: of measuring for each candidate, for at least
        minimum: repetitions.
        limits: what the device can do.

    Returns:
        A result for each kernel of each contender that gave right numbers, and a refusal for each
        other.
    """
    refused: list[dict[str, Any]] = []

    def refuse(candidate: Candidate, form: str, reason: str) -> None:
        who = {"contender": candidate.contender, "variant": candidate.variant, "form": form}
        refused.append(problem.cell() | who | {"reason": reason})

    inputs = problem.make(device)
    exact = Exact(problem, inputs)
    checked: list[Checked] = []
    for candidate in candidates(problem, names, device):
        verdict = check(candidate, inputs, exact, exact.grad, TOLERANCES[problem.dtype])
        if isinstance(verdict, str):
            refuse(candidate, "", verdict)
        else:
            checked.append(verdict)
    warmup = 2 if device.type == "cuda" else 1
    timed, out_of_memory = time_all(checked, clock, seconds=seconds, minimum=minimum, warmup=warmup)
    for c in out_of_memory:
        refuse(c.candidate, c.form, "it ran out of memory")
    results: list[dict[str, Any]] = []
    floor = limits.floor(problem.cache_bytes, problem.flops, problem.dtype)
    for c, timings in timed:
        spread = report.spread([t.seconds for t in timings["forward"]])
        rate = problem.cache_bytes / spread.median
        host = statistics.median(t.host_seconds for t in timings["forward"])
        results.append(
            problem.cell()
            | c.names()
            | {
                "bytes": problem.cache_bytes,
                "seconds": spread._asdict(),
                "gb_per_second": rate * 1e-9,
                "copy_share": rate / limits.bytes_per_second,
                "floor_seconds": floor._asdict(),
                "share_of_floor": floor.floor / spread.median,
                "repetitions": len(timings["forward"]),
                **({"host_seconds": host} if device.type == "cuda" else {}),
                "errors": c.errors,
            }
        )
    attention_report.mark_best(results)
    return results, refused


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.decode",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--parts", nargs="+", choices=PARTS, help="default: kernel on a GPU, generate on a CPU")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--output", type=Path, help="JSON file, a picture beside it; default benchmarks/results/decode_DEVICE.json")
    add("--quick", action="store_true", help="tiny sizes, a smoke test; writes to runs/ unless told otherwise")
    kernel = made.add_argument_group("kernel").add_argument
    kernel("--layouts", nargs="+", choices=DECODED, default=["gda4_128", "v1_64"], help="default: %(default)s")
    kernel("--batches", nargs="+", type=int, help="rows; default 8 1 32 128, on a CPU 1 8")
    kernel("--contexts", nargs="+", type=int, help="tokens a row; default 32768 131072 8192 1024, on a CPU 1024 8192")
    kernel("--dtypes", nargs="+", choices=list(DTYPES), help="default: bf16 on a GPU, float32 and bf16 on a CPU")
    kernel("--contenders", nargs="+", choices=list(CONTENDERS), help="default: all that can run here, but flex")
    kernel("--head-divisor", type=int, help="leave one of so many heads; default 1 on a GPU, 8 on a CPU")
    kernel("--seconds", type=float, help="of measuring for each kernel at each size; default 0.05 on a GPU, 0.5 on CPU")
    kernel("--limit", type=float, help="seconds after which no new size is begun; default none")
    generate = made.add_argument_group("generate").add_argument
    cells = " ".join(f"{c.precision}:{c.batch}x{c.context}" for c in CPU_CELLS)
    generate("--cells", nargs="+", metavar="PRECISION:BATCHxCONTEXT", help=f"default: {cells}")
    generate("--models", nargs="+", choices=list(MODELS), help=f"default: {' '.join(DEFAULT_MODELS)}")
    generate("--new-tokens", type=int, help="of a call; default 32")
    generate("--rounds", type=int, help="timed calls of each model at each size; default 7")
    generate("--cache", choices=CACHES, default="static", help="default: %(default)s, for all models")
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
    for name in ("batches", "contexts", "head_divisor", "seconds", "limit", "new_tokens", "rounds", "threads"):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    device, quick = torch.device(arguments.device), arguments.quick
    cuda = device.type == "cuda"
    arguments.parts = arguments.parts or ["kernel" if cuda else "generate"]
    # The most telling ones first: time may run out.
    arguments.batches = arguments.batches or ([1, 2] if quick else [8, 1, 32, 128] if cuda else [1, 8])
    contexts = [96] if quick else [32768, 131072, 8192, 1024] if cuda else [1024, 8192]
    arguments.contexts = arguments.contexts or contexts
    arguments.dtypes = arguments.dtypes or (["bf16"] if cuda else list(DTYPES))
    arguments.head_divisor = arguments.head_divisor or (1 if cuda and not quick else 8)
    arguments.seconds = arguments.seconds or (0.01 if quick else 0.05 if cuda else 0.5)
    cells = [Cell.parse(text) for text in arguments.cells or ()]
    # A precision's models are built once.
    cells = sorted(cells, key=lambda cell: [c.precision for c in cells].index(cell.precision))
    arguments.cells = cells or list(QUICK_CELLS if quick else CPU_CELLS)
    arguments.models = list(dict.fromkeys(arguments.models or DEFAULT_MODELS))
    arguments.new_tokens = arguments.new_tokens or (4 if quick else 32)
    arguments.rounds = arguments.rounds or (2 if quick else 7)
    torch.set_num_threads(arguments.threads)
    missing = unavailable(device)
    for name in arguments.contenders or ():
        if name in missing:
            raise UserError(f"--contenders {name}: {missing[name]}; leave it out")
    missing |= {"flex": "it compiles for long; --contenders with flex among them measures it"}
    arguments.left_out = {} if arguments.contenders else missing
    arguments.contenders = arguments.contenders or [name for name in CONTENDERS if name not in missing]
    return device


def problems(arguments: argparse.Namespace) -> Iterator[Decoding]:
    """What the (resolved) command line asks of the kernels."""
    for context in arguments.contexts:
        for batch in arguments.batches:
            for name in arguments.layouts:
                for dtype in arguments.dtypes:
                    yield decoding(name, dtype, batch, context, head_divisor=arguments.head_divisor)


class Run:
    """A benchmark run: what is measured goes into ``content``, and with each size anew into the
    file.
    """

    def __init__(self, arguments: argparse.Namespace, device: torch.device, console: Console):
        self.arguments, self.device, self.console = arguments, device, console
        runs, results = report.ROOT / "runs", report.RESULTS
        default = runs / "decode_quick.json" if arguments.quick else results / f"decode_{device_slug(device)}.json"
        self.path: Path = arguments.output or default
        env = report.environment("benchmarks.decode", device, PACKAGES)
        console.print(report.describe(env), style="dim")
        if warning := report.busy_warning(env):
            console.print(f"warning: {warning}", style="yellow")
        self.content: dict[str, Any] = {
            "benchmark": "decode",
            "format": 1,
            "complete": False,
            "environment": env,
            "settings": {name: getattr(arguments, name) for name in SETTINGS},
            "aims": [],
        }

    def keep(self) -> None:
        """Write the file."""
        report.write_json(self.path, self.content)

    def announce(self, what: str) -> None:
        """For a log file, which shows no bar while it moves."""
        if not self.console.is_terminal:
            self.console.print(what)

    def kernel(self) -> None:
        """Measure the kernels."""
        arguments, content, device = self.arguments, self.content, self.device
        for name, reason in arguments.left_out.items():
            self.console.print(f"{CONTENDERS[name]} is left out: {reason}", style="dim")
        clock, begun = clock_for(device), time.monotonic()
        dtypes = {name: DTYPES[name] for name in arguments.dtypes}
        limits = measure_limits(device, clock, dtypes, seconds=arguments.seconds, quick=arguments.quick)
        content |= {
            **limits.content(),
            "layouts": {name: describe(LAYOUTS[name]) for name in arguments.layouts},
            "contenders": {name: CONTENDERS[name] for name in arguments.contenders},
            "left_out": arguments.left_out,
            "flash_attn_missing": flash_attn_libraries()[1] if device.type == "cuda" else {},
            "tolerances": {dtype: TOLERANCES[dtype] for dtype in arguments.dtypes},
            **{name: [] for name in ("results", "refused", "skipped", "not_begun")},
        }
        todo = list(problems(arguments))
        with report.progress(self.console) as bar:
            task = bar.add_task("", total=len(todo))
            for p in todo:
                if arguments.limit is not None and time.monotonic() - begun > arguments.limit:
                    content["not_begun"].append(p.cell())
                    continue
                bar.update(task, description=p.describe())
                self.announce(p.describe())
                self._measure(p, clock, limits)
                self.keep()
                bar.advance(task)

    def _measure(self, problem: Decoding, clock: Clock, limits: Limits) -> None:
        def skip(reason: str) -> None:
            self.content["skipped"].append(problem.cell() | {"reason": reason})

        if reason := too_large(problem, free_memory(self.device)):
            skip(reason)
            return
        minimum = 2 if self.arguments.quick else 5
        try:
            results, refused = measure(
                problem,
                self.arguments.contenders,
                self.device,
                clock,
                seconds=self.arguments.seconds,
                minimum=minimum,
                limits=limits,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            skip(reason_of(error))
        else:
            self.content["results"] += results
            self.content["refused"] += refused

    def generate(self) -> None:
        """Measure the models."""
        arguments, content = self.arguments, self.content
        positions = max(c.context for c in arguments.cells) + arguments.new_tokens + 1
        sizes = Sizes(128, 2, 16, 256, 352, 8, positions) if arguments.quick else Sizes(max_positions=positions)
        setup = Setup(sizes, arguments.new_tokens, arguments.cache, arguments.rounds, arguments.device)
        entries = match_parameters(arguments.models, sizes)
        content |= {"sizes": vars(sizes), "models": [e.describe() for e in entries.values()], "generated": []}
        precisions = len({c.precision for c in arguments.cells})
        # A step is a model's building, its prompt, or a call, the untimed first one included.
        total = len(entries) * (precisions + len(arguments.cells) * (2 + setup.rounds))
        with report.progress(self.console) as bar:
            task = bar.add_task("", total=total)
            steps = iter(range(total))

            def show(what: str, name: str) -> None:
                bar.update(task, completed=next(steps), description=f"{what}: {MODELS[name].label}")

            def keep(cell: Cell, results: list[dict[str, Any]]) -> None:
                content["generated"] += results
                self.announce(f"generate, {cell.describe()}: measured")
                self.keep()

            measure_all(arguments.cells, entries, setup, show=show, keep=keep)
            bar.update(task, completed=total, description="measured")

    def pictures(self) -> dict[Path, Any]:
        """Where the pictures go, and what draws each: the first part's beside the file has its
        name.
        """
        drawn: dict[Path, Any] = {}
        for part, key, draw in (
            ("kernel", "results", decode_report.draw_kernels),
            ("generate", "generated", decode_report.draw_generate),
        ):
            if self.content.get(key):
                name = f"{self.path.stem}_{part}.png" if drawn else f"{self.path.stem}.png"
                drawn[self.path.with_name(name)] = functools.partial(draw, content=self.content)
        return drawn

    def finish(self) -> int:
        """Judge, print and draw; the exit status: 1 if ours was refused anywhere, or if it was
        stopped.
        """
        content, console = self.content, self.console
        if not content["complete"]:
            console.print("stopped: the figures so far follow", style="yellow")
        if not self.arguments.quick:
            content["aims"] += decode_report.judge_kernels(content.get("results", []), self.device)
            content["aims"] += judge_generate(content.get("generated", []))
        self.keep()
        if "results" in content:
            decode_report.print_kernels(console, content)
        if "generated" in content:
            decode_report.print_generate(console, content)
        decode_report.print_aims(console, content["aims"])
        console.print(f"figures: {self.path}", soft_wrap=True)
        for path, draw in self.pictures().items():
            draw(path)
            console.print(f"picture: {path}", soft_wrap=True)
        return int(not content["complete"] or any(r["contender"] in OURS for r in content.get("refused", ())))


def run(arguments: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Measure what the (resolved) command line asks for and report.

    Returns:
        The exit status: 1 if motif_kernels was refused anywhere, or if it was stopped before the
        end.
    """
    made = Run(arguments, device, console)
    with contextlib.suppress(KeyboardInterrupt), terminate_as_interrupt():
        for part in PARTS:
            if part in arguments.parts:
                getattr(made, part)()
        made.content["complete"] = True
    return made.finish()


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
