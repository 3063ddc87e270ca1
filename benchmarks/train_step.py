"""A full training step: tokens per second, work done, peak memory and costs, against transformers'
Llama and DiffLlama.

    python -m benchmarks.train_step                               # about ten minutes on two cores
    python -m benchmarks.train_step --shape 300m --compile        # 300 million parameters, on a GPU
    python -m benchmarks.train_step --shape 2.6b --compile        # Motif-2.6B's shape, a few layers of it, on a GPU
    python -m benchmarks.train_step --quick --shape 300m --compile  # the same command at a tiny size, with no meaning
    python -m benchmarks.train_step --profile gda                 # where one model's step goes, operator by operator

A step is forward, loss, backward, gradient clipping, AdamW (torch's fused one) and zero_grad, over
random tokens. The models have equal hidden size, layers and head width, and equal numbers of
parameters to 3% (see contenders.py). Each takes its loss its own way, as its users get it:
transformers' models from whole logits, ours in chunks. Llama is measured with every attention that
it can have here, and its fastest is what others are held to.

Every model is trained as motifarch's own loop trains: FSDP2 on a world of one, float32 master
weights, and bfloat16 copies of them for the work where the precision is bf16; with ``--compile``
each decoder layer through torch.compile, by the function that ``compile: true`` calls, the rest as
it is, for every model. With ``--autocast``, plain modules under ``torch.autocast`` instead of
FSDP2.

*Processes.* Each model, length and precision has a fresh process, which is asked for one thing at a
time. While one is timed, the others wait. One that fails, runs out of memory or dies is reported
with the reason, and the others go on.

*Speed.* The models take turns, a step each (on a GPU five, after one that is not timed), in an
order that rotates from round to round, so that a drift of the machine's speed hits all alike. The
figure is the median step, with the quartiles. Between turns a model keeps weights and Adam's
moments, 12 bytes a parameter, and on a GPU its CUDA context: six of the 300m or 2.6b shape are 23
GB and the contexts, and the one whose turn it is adds some 30 GB. ``--memory-steps`` steps come
before all turns; the first is reported by itself, for what is compiled is compiled in it.

*Work.* Model operations of a token are counted by MotifForCausalLM.flops_per_token, transformers'
models as ours with the same matrices and maps; nothing that is recomputed is in it. MFU is their
rate over the GPU's dense bf16 peak.

*Memory.* On a CPU it is what the process's resident set rises, at its highest in the first steps,
above what it was before the model was built: weights, gradients, optimizer states, activations,
work space, and what the allocator keeps. Libraries loaded on first use are not in it: a tiny model
of the same kind takes a step first. On a GPU it is ``torch.cuda.max_memory_allocated``.

*Costs.* Of GDA and the fastest Llama (``--costs``), at the longest length: the five GPU kernels, on
a CPU operators, with the most time of their own, and their share of all.

``--limit`` shares its seconds among precisions and lengths: in each, models get ready in the order
of ``--models`` for two thirds of the time (to be compiled on a GPU, as many at once as fit, for
that takes long and one core), then take turns, and costs come last. Figures are written as they
come.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import train_step_report
from benchmarks.contenders import CONTENDERS, LLAMAS, Entry, Sizes, match_parameters
from benchmarks.kernels import device_slug, terminate_as_interrupt
from benchmarks.lib import report
from benchmarks.shapes import SHAPES, default_shape, find_peak
from benchmarks.train_profile import operator_table
from benchmarks.train_worker import Prepared, Worker
from benchmarks.training import DTYPES, Failed, OutOfTime, Setup, TrainStep, take_turns
from motifarch.errors import UserError

MODULE = "benchmarks.train_step"
PACKAGES = ("motifarch", "torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4")
_GETTING_READY = 2 / 3  # the part of a limit for building, compiling and first steps
_GETTING_READY_BYTES = 36 << 30  # what a model of a shape needs at most, and what the others keep meanwhile
_TURNS = 0.9  # when the last round may begin
_PATIENCE = 60.0  # seconds beyond the limit for a round that has begun
_PROFILED_STEPS = 2


class Benchmark:
    """A run: what it measures, and the file that it writes."""

    def __init__(
        self, arguments: argparse.Namespace, setup: Setup, entries: Mapping[str, Entry], env: dict[str, Any], path: Path
    ):
        self.arguments, self.setup, self.entries, self.path = arguments, setup, entries, path
        self.ends = None if arguments.limit is None else time.monotonic() + arguments.limit
        gpu, text = None, "no MFU: that takes a GPU"
        if setup.device == "cuda":
            gpu, text = find_peak(torch.cuda.get_device_name())
        settings = ("rounds", "steps", "warmup", "memory_steps", "limit", "quick")
        shape = {"name": arguments.shape, "text": SHAPES[arguments.shape].text}
        self.content: dict[str, Any] = {
            "benchmark": "train_step",
            "format": 1,
            "complete": False,
            "environment": env,
            "settings": dataclasses.asdict(setup) | {name: getattr(arguments, name) for name in settings},
            "shape": shape,
            "peak": {"gpu": gpu and gpu.name, "bf16_flops": gpu and gpu.bf16_flops, "text": text}
            | {"source": gpu and gpu.source},
            "models": [entry.describe() for entry in entries.values()],
            "left_out": arguments.left_out,
            "results": [],
            "failed": [],
            "not_begun": [],
            "profiles": [],
            "aims": [],
        }

    def measure(self, console: Console) -> None:
        """Everything, a precision and length after the other."""
        todo = list(itertools.product(self.arguments.precisions, self.arguments.seq_lens))
        per_cell = self.arguments.memory_steps + self.arguments.rounds + self.arguments.warmup
        with report.progress(console) as bar:
            task = bar.add_task("", total=len(todo) * len(self.entries) * per_cell)
            for i, (precision, seq_len) in enumerate(todo):
                left = None if self.ends is None else self.ends - time.monotonic()
                if left is not None and left <= 0:
                    self.content["not_begun"].append({"precision": precision, "seq_len": seq_len})
                    continue
                cell = Cell(self, precision, seq_len, None if left is None else left / (len(todo) - i))
                if not console.is_terminal:  # a log file shows no bar while it moves
                    console.print(f"{precision}, {seq_len} tokens")
                cell.measure(bar, task, profile=seq_len == max(self.arguments.seq_lens))
                bar.update(task, completed=(i + 1) * len(self.entries) * per_cell)
            bar.update(task, description="measured")
        self.content["complete"] = True

    def save(self) -> None:
        """Write the figures there are."""
        self.content["aims"] = [] if self.arguments.quick else train_step_report.judge(self.content["results"])
        report.write_json(self.path, self.content)


class Cell:
    """One precision and length."""

    def __init__(self, benchmark: Benchmark, precision: str, seq_len: int, seconds: float | None):
        self.benchmark, self.precision, self.seq_len = benchmark, precision, seq_len
        self.begun, self.seconds = time.monotonic(), seconds
        self.prepared: dict[str, Prepared] = {}
        self.others = list(benchmark.content["results"])
        self.during = "getting ready"

    def left(self, share: float = 1.0) -> float | None:
        """Seconds until a share of the time is over, at least 0; None without a limit."""
        return None if self.seconds is None else max(0.0, self.begun + share * self.seconds - time.monotonic())

    def fail(self, name: str, error: Failed) -> None:
        """Note who could not go on."""
        row = {"model": name, "precision": self.precision, "seq_len": self.seq_len, "during": self.during}
        known = dataclasses.asdict(self.prepared[name]) if name in self.prepared else {}
        row |= {"reason": str(error), "out_of_time": isinstance(error, OutOfTime)}
        self.benchmark.content["failed"].append(row | known)
        self.benchmark.save()

    def measure(self, bar: Progress, task: Any, *, profile: bool) -> None:
        """Get ready, take turns, profile."""
        arguments = self.benchmark.arguments
        with contextlib.ExitStack() as processes:
            workers = {
                name: processes.enter_context(Worker(entry, self.benchmark.setup, self.precision, self.seq_len))
                for name, entry in self.benchmark.entries.items()
            }

            def show(name: str) -> None:
                where = f"{self.precision}, {self.seq_len} tokens, {self.during}"
                bar.update(task, description=f"{where}: {CONTENDERS[name].label}")

            self.get_ready(workers, show, partial(bar.advance, task, arguments.memory_steps))
            self.during = "taking turns"

            def on_turn(name: str) -> None:
                show(name)
                bar.advance(task)

            take_turns(
                {name: partial(self.turn, workers[name]) for name in self.prepared},
                rounds=arguments.rounds,
                warmup=arguments.warmup,
                on_turn=on_turn,
                on_round=self.note,
                on_failure=self.fail,
                out_of_time=lambda: self.left(_TURNS) == 0,
            )
            self.during = "profiling"
            for name in self.to_profile() if profile else ():
                show(name)
                try:
                    costs = workers[name].profile(_PROFILED_STEPS, self.left())
                except Failed as error:
                    self.fail(name, error)
                    continue
                where = {"model": name, "precision": self.precision, "seq_len": self.seq_len}
                self.benchmark.content["profiles"].append(where | dict(costs))
        self.benchmark.save()

    def get_ready(self, workers: Mapping[str, Worker], show: Callable[[str], None], done: Callable[[], None]) -> None:
        """Build, compile and weigh the models, as many at once as a GPU has room for, on a CPU one
        after the other.
        """
        at_once = 1
        if self.benchmark.setup.device == "cuda" and self.benchmark.setup.compile:  # else there is little to wait for
            at_once = max(1, torch.cuda.get_device_properties(0).total_memory // _GETTING_READY_BYTES)

        def prepare(name: str) -> Prepared:
            show(name)
            return workers[name].prepare(self.benchmark.arguments.memory_steps, self.left(_GETTING_READY))

        with ThreadPoolExecutor(at_once) as pool:
            try:
                futures = {name: pool.submit(prepare, name) for name in workers}
                for name, future in futures.items():
                    try:
                        self.prepared[name] = future.result()
                    except Failed as error:
                        self.fail(name, error)
                    done()
            except BaseException:  # the pool is left only when its threads have an answer
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in workers.values():
                    worker.process.kill()
                raise

    def turn(self, worker: Worker) -> list[float]:
        """Seconds of a turn's steps; one that hangs does not keep the rest of a limited run from
        ending.
        """
        left = self.left()
        return worker.time(self.benchmark.arguments.steps, None if left is None else left + _PATIENCE)

    def to_profile(self) -> list[str]:
        """Those of ``--costs`` that were timed; of the Llamas the fastest."""
        timed = self.benchmark.content["results"][len(self.others) :]
        best = train_step_report.fastest(timed, LLAMAS)
        given = self.benchmark.arguments.costs
        names = given if given is not None else ["gda", *([best["model"]] if best else [])]
        return [name for name in names if any(r["model"] == name for r in timed)]

    def note(self, seconds: Mapping[str, list[float]]) -> None:
        """Set this cell's results to what all rounds so far say, and write the file."""
        setup, peak = self.benchmark.setup, self.benchmark.content["peak"]["bf16_flops"]
        results = []
        for name, values in seconds.items():
            speed = report.spread([setup.tokens_per_step / s for s in values])
            operations = self.benchmark.entries[name].operations_per_token(setup.sizes, self.seq_len)
            rate = operations * speed.median
            results.append(
                {
                    "model": name,
                    "precision": self.precision,
                    "seq_len": self.seq_len,
                    "tokens_per_step": setup.tokens_per_step,
                    "tokens_per_second": speed._asdict(),
                    "flops_per_token": operations,
                    "model_tflops": rate * 1e-12,
                    "mfu": rate / peak if peak and self.precision == "bf16" else None,
                    "seconds": values,
                    **dataclasses.asdict(self.prepared[name]),
                }
            )
        self.benchmark.content["results"] = self.others + results
        self.benchmark.save()


def print_profile(setup: Setup, entry: Entry, arguments: argparse.Namespace, console: Console) -> None:
    """The operators that one model's step spends its time in, by their own time without the
    operators they call.
    """
    for precision in arguments.precisions:
        with setup.world():
            step = TrainStep(entry, setup, precision)
            for seq_len in arguments.seq_lens:
                batch = setup.batch(seq_len)
                for _ in range(2):
                    step(batch)
                steps = arguments.rounds
                console.rule(f"{entry.contender.label}, {precision}, {seq_len} tokens, {steps} steps")
                # Longer than a console is wide: printed as it is.
                print(operator_table(partial(step, batch), steps, setup.device))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog=f"python -m {MODULE}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    names = ", ".join(CONTENDERS)
    shapes = "; ".join(f"{name} is {shape.text}" for name, shape in SHAPES.items())
    add("--shape", choices=list(SHAPES), help=f"sizes and batches; default 300m on a GPU, else small: {shapes}")
    add("--models", nargs="+", choices=list(CONTENDERS), metavar="MODEL", help=f"default: the shape's; of {names}")
    add("--seq-lens", nargs="+", type=int, help="tokens of a row; default: the shape's, 512 2048 or 4096")
    add("--precisions", nargs="+", choices=list(DTYPES), help="default: all for small, else bf16")
    add("--tokens-per-step", type=int, help="tokens of a batch, at every length; default 2048 for small, else 16384")
    add("--compile", action="store_true", help="every model's decoder layers through torch.compile")
    add("--rounds", type=int, help="rounds of turns; default 9, on a GPU 3")
    add("--steps", type=int, help="timed steps of a turn; default 1, on a GPU 5")
    add("--warmup", type=int, help="untimed rounds before them; default 1, on a GPU 0")
    add("--memory-steps", type=int, default=3, help="first steps, in which peak memory is sought; default %(default)s")
    add("--limit", type=float, help="seconds in all; what does not fit is said; default: none")
    add("--costs", nargs="*", choices=list(CONTENDERS), metavar="MODEL", help="default: gda and the fastest Llama")
    for name in ("hidden_size", "num_layers", "head_dim", "vocab_size"):
        add(f"--{name.removeprefix('num_').replace('_', '-')}", dest=name, type=int, help="default: the shape's")
    add("--intermediate-size", type=int, help="Llama's feed-forward width; default: grows with the hidden size")
    add("--gda-heads", type=int, help="query heads of the first GDA; default 5/4 of Llama's, as in Motif-2-12.7B")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--autocast", action="store_true", help="bf16 by torch.autocast on plain modules, without FSDP2")
    add("--output", type=Path, help="JSON file, a picture beside it; default benchmarks/results/train_step_DEVICE.json")
    add("--quick", action="store_true", help="tiny models, a smoke test; writes to runs/ unless told otherwise")
    add("--profile", choices=list(CONTENDERS), metavar="MODEL", help="print one model's top operators, measure nothing")
    return made


def resolve(arguments: argparse.Namespace) -> Setup:
    """Fill in the defaults that depend on device and shape, and check.

    Raises:
        UserError: a number or a length that has no meaning, or a model that cannot run here.
    """
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda, quick = arguments.device == "cuda", arguments.quick
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    arguments.shape = arguments.shape or default_shape(arguments.device)
    shape = SHAPES[arguments.shape]
    arguments.seq_lens = arguments.seq_lens or ([16, 64][-len(shape.seq_lens) :] if quick else list(shape.seq_lens))
    arguments.precisions = arguments.precisions or list(shape.precisions)
    defaults = {
        "tokens_per_step": 64 if quick else shape.tokens_per_step,
        "rounds": 3 if quick or cuda else 9,
        "steps": 5 if cuda else 1,
        "warmup": 0 if quick or cuda else 1,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    for name, least in {"rounds": 1, "steps": 1, "memory_steps": 2, "threads": 1, "warmup": 0}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    if arguments.limit is not None and not arguments.limit > 0:
        raise UserError(f"--limit is {arguments.limit}; it must be above 0")
    for seq_len in arguments.seq_lens:
        if seq_len < 2 or arguments.tokens_per_step % seq_len:
            raise UserError(
                f"--tokens-per-step {arguments.tokens_per_step} is not a whole number of rows of {seq_len} tokens; "
                "all lengths must have batches of the same tokens, so choose a multiple of each of --seq-lens"
            )
    _choose_models(arguments)
    torch.set_num_threads(arguments.threads)
    device, threads = arguments.device, arguments.threads
    return Setup(
        _sizes(arguments), arguments.tokens_per_step, device, threads, arguments.autocast, compile=arguments.compile
    )


def _choose_models(arguments: argparse.Namespace) -> None:
    """Those that can run here; one that was asked for by name must."""
    if arguments.profile:
        arguments.models = [arguments.profile]
    asked = dict.fromkeys(arguments.models or SHAPES[arguments.shape].models)
    reasons = {name: CONTENDERS[name].unavailable(arguments.device) for name in asked}
    missing = {name: reason for name, reason in reasons.items() if reason}
    if arguments.models and missing:
        name, reason = next(iter(missing.items()))
        raise UserError(f"{name} cannot be measured here: {reason}; leave it out of --models")
    arguments.left_out = missing
    arguments.models = [name for name in asked if name not in missing]


def _sizes(arguments: argparse.Namespace) -> Sizes:
    shape = SHAPES[arguments.shape].sizes
    names = ("hidden_size", "num_layers", "head_dim", "vocab_size", "intermediate_size", "gda_heads")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if "hidden_size" in given:
        given.setdefault("intermediate_size", shape.intermediate_size * given["hidden_size"] // shape.hidden_size)
    sizes = dataclasses.replace(shape, **given)
    if arguments.quick:
        sizes = sizes.shrunk()
    return dataclasses.replace(sizes, max_positions=max(arguments.seq_lens))


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and report as the command line asks.

    Returns:
        The exit status: 1 if one of ours failed, nothing could be measured, or it was stopped
        before the end.

    Raises:
        UserError: sizes that no model can have, or options that have no meaning.
    """
    setup = resolve(arguments)
    entries = match_parameters(arguments.models, setup.sizes)
    if arguments.profile:
        print_profile(setup, entries[arguments.profile], arguments, console)
        return 0
    device = torch.device(arguments.device)
    env = report.environment(MODULE, device, PACKAGES)
    console.print(report.describe(env), style="dim")
    console.print(f"{arguments.shape}: {SHAPES[arguments.shape].text}", style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    small = arguments.shape == "small"
    name = f"train_step_{device_slug(device)}{'' if small else '_' + arguments.shape}.json"
    default = report.ROOT / "runs" / "train_step_quick.json" if arguments.quick else report.RESULTS / name
    benchmark = Benchmark(arguments, setup, entries, env, arguments.output or default)
    with contextlib.suppress(KeyboardInterrupt), terminate_as_interrupt():
        benchmark.measure(console)
    # A time limit that ends only now need not cost the tables and the picture.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return finish(benchmark, console)
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(benchmark: Benchmark, console: Console) -> int:
    """Write and show what was measured; the exit status."""
    content, path = benchmark.content, benchmark.path
    if not content["complete"]:
        console.print("stopped: the figures so far follow", style="yellow")
    benchmark.save()
    train_step_report.print_results(console, content)
    console.print(f"figures: {path}", soft_wrap=True)
    if content["results"]:
        train_step_report.draw(path.with_suffix(".png"), content)
        console.print(f"picture: {path.with_suffix('.png')}", soft_wrap=True)
    broken = [f["model"] for f in content["failed"] if not f["out_of_time"]]
    ours = any(CONTENDERS[name].library == "motifarch" for name in broken)
    return int(not content["complete"] or ours or not content["results"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        return run(arguments, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
