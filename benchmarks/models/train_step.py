"""A full training step, beside transformers' Llama and DiffLlama: speed, memory, costs.

    python -m benchmarks.models.train_step                          # ten minutes on two cores
    python -m benchmarks.models.train_step --shape 300m --compile   # 300M parameters, on a GPU
    python -m benchmarks.models.train_step --shape 2.6b --compile   # Motif-2.6B's shape, on a GPU
    python -m benchmarks.models.train_step --quick --shape 300m     # a smoke test
    python -m benchmarks.models.train_step --profile gda            # one model's operators

A step is forward, loss, backward, gradient clipping, AdamW (torch's fused one) and zero_grad, over
random tokens. Models have equal hidden size, layers and head_dim, and equal parameters to 3%
(providers.py). Each takes its loss as its users get it: transformers' from whole logits, ours in
chunks. Llama has every attention that it can have here, and is judged by its fastest.

All are trained as motifarch trains: FSDP2 on a world of one, float32 master weights, bfloat16
copies where the precision is bf16. With --autocast, plain modules under torch.autocast instead.

Each model, length and precision has a fresh process; while one is timed, the others wait. One that
fails, runs out of memory or dies is reported, and the others go on.

Speed: the median step, with quartiles. Models take turns in an order that rotates, a step each, on
a GPU five. --memory-steps steps come before; the first compiles, and is reported by itself.
Work: MotifForCausalLM.flops_per_token, for transformers' models that of ours with the same matrices
and maps; nothing that is recomputed is in it. MFU is its rate over the GPU's dense bf16 peak.
Memory: on a CPU the rise of the process's resident set, at its highest in the first steps, over
that before the model was built. On a GPU torch.cuda.max_memory_allocated.
Costs: of GDA and the fastest Llama (--costs), at the longest length, the five GPU kernels (on a CPU
operators) with the most time of their own.

--limit shares its seconds among precisions and lengths. In each, models get ready in the order of
--models for two thirds of the time (compiled on a GPU as many at once as fit), then take turns, and
costs come last. Figures are written as they come.
"""

import argparse
import contextlib
import dataclasses
import itertools
import signal
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.status import Status

from benchmarks.lib import cli, report
from benchmarks.lib.bench import DTYPES
from benchmarks.models import report as models_report
from benchmarks.models.providers import LLAMAS, PROVIDERS, choose, match_parameters
from benchmarks.models.report import MEMORY, SPEED, Aim
from benchmarks.models.shapes import SHAPES, find_peak
from benchmarks.models.training import Failed, OutOfTime, Setup, Worker
from motifarch.errors import UserError

MODULE = "benchmarks.models.train_step"
PACKAGES = ("motifarch", "torch", "triton", "transformers", "flash-attn", "flash-attn-3", "flash-attn-4")
GDA = ("gda", "gda_narrow")
AIMS = (
    Aim("DiffLlama", SPEED, 1.2, 512),
    Aim("DiffLlama", SPEED, 1.2, 2048),
    Aim("Llama", SPEED, 0.9, 512),
    Aim("Llama", SPEED, 0.9, 4096),
    Aim("DiffLlama", MEMORY, 1.0, 512),
    Aim("DiffLlama", MEMORY, 1.0, 2048),
)
_GETTING_READY = 2 / 3  # the part of a limit for building, compiling and first steps
_GETTING_READY_BYTES = 36 << 30  # what a model of a shape needs at most, and what the others keep meanwhile
_TURNS = 0.9  # when the last round may begin
_PATIENCE = 60.0  # seconds beyond the limit for a round that has begun
_PROFILED_STEPS = 2


class Benchmark:
    """A run: what it measures, and the file that it writes."""

    def __init__(self, arguments: argparse.Namespace, setup: Setup, env: dict[str, Any], path: Path):
        self.arguments, self.setup, self.path = arguments, setup, path
        self.models = match_parameters(arguments.models, setup.sizes)
        self.ends = None if arguments.limit is None else time.monotonic() + arguments.limit
        gpu, text = None, "no MFU: that takes a GPU"
        if setup.device == "cuda":
            gpu, text = find_peak(torch.cuda.get_device_name())
        settings = ("rounds", "steps", "warmup", "memory_steps", "limit", "quick")
        self.content: dict[str, Any] = {
            "benchmark": "train_step",
            "format": 1,
            "complete": False,
            "environment": env,
            "settings": dataclasses.asdict(setup) | {name: getattr(arguments, name) for name in settings},
            "shape": {"name": arguments.shape, "text": SHAPES[arguments.shape].text},
            "peak": {"gpu": gpu and gpu.name, "bf16_flops": gpu and gpu.bf16_flops, "source": gpu and gpu.source}
            | {"text": text},
            "models": [model.describe() for model in self.models.values()],
            "left_out": arguments.left_out,
            **{name: [] for name in ("results", "failed", "not_begun", "profiles", "aims")},
        }

    def measure(self, console: Console) -> None:
        """Everything, a precision and length after the other."""
        todo = list(itertools.product(self.arguments.precisions, self.arguments.seq_lens))
        for i, (precision, seq_len) in enumerate(todo):
            left = None if self.ends is None else self.ends - time.monotonic()
            if left is not None and left <= 0:
                self.content["not_begun"].append({"precision": precision, "seq_len": seq_len})
                continue
            console.print(f"{precision}, {seq_len} tokens")
            with console.status("") as status:
                cell = Cell(self, precision, seq_len, None if left is None else left / (len(todo) - i), status)
                cell.measure(profile=seq_len == max(self.arguments.seq_lens))
        self.content["complete"] = True

    def save(self) -> None:
        """Write the figures there are."""
        results = self.content["results"]
        self.content["aims"] = [] if self.arguments.quick else models_report.judge(results, GDA, AIMS)
        report.write_json(self.path, self.content)


class Cell:
    """One precision and length."""

    def __init__(self, benchmark: Benchmark, precision: str, seq_len: int, seconds: float | None, status: Status):
        self.benchmark, self.arguments, self.setup = benchmark, benchmark.arguments, benchmark.setup
        self.where: dict[str, Any] = {"precision": precision, "seq_len": seq_len}
        self.begun, self.seconds, self.status = time.monotonic(), seconds, status
        self.workers: dict[str, Worker] = {}
        self.prepared: dict[str, dict[str, Any]] = {}
        self.others = list(benchmark.content["results"])
        self.during = "getting ready"

    def left(self, share: float = 1.0) -> float | None:
        """Seconds until a share of the time is over, at least 0; None without a limit."""
        return None if self.seconds is None else max(0.0, self.begun + share * self.seconds - time.monotonic())

    def ask(self, name: str, request: str, steps: int, timeout: float | None) -> Any:
        """A worker's answer; None, and a note of the reason, if its model could not go on."""
        self.status.update(f"{models_report.describe(self.where)}, {self.during}: {PROVIDERS[name].label}")
        try:
            return self.workers[name].ask(request, steps, timeout)
        except Failed as error:
            row = {"model": name, **self.where, "during": self.during, "reason": str(error)}
            row |= {"out_of_time": isinstance(error, OutOfTime), **self.prepared.get(name, {})}
            self.benchmark.content["failed"].append(row)
            self.benchmark.save()
            return None

    def measure(self, *, profile: bool) -> None:
        """Get ready, take turns, profile."""
        with contextlib.ExitStack() as processes:
            for name, model in self.benchmark.models.items():
                self.workers[name] = Worker(model, self.setup, **self.where)
                processes.callback(self.workers[name].close)
            self.get_ready()
            self.during = "taking turns"
            self.take_turns()
            self.during = "profiling"
            for name in self.to_profile() if profile else ():
                if costs := self.ask(name, "profile", _PROFILED_STEPS, self.left()):
                    self.benchmark.content["profiles"].append({"model": name, **self.where, **costs})
        self.benchmark.save()

    def get_ready(self) -> None:
        """Build, compile and weigh the models, as many at once as a GPU has room for."""
        at_once = 1
        if self.setup.device == "cuda" and self.setup.compile:  # else there is little to wait for
            at_once = max(1, torch.cuda.get_device_properties(0).total_memory // _GETTING_READY_BYTES)

        def prepare(name: str) -> None:
            if answer := self.ask(name, "prepare", self.arguments.memory_steps, self.left(_GETTING_READY)):
                self.prepared[name] = answer

        with ThreadPoolExecutor(at_once) as pool:
            try:
                list(pool.map(prepare, self.workers))
            except BaseException:  # the pool is left only when its threads have an answer
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in self.workers.values():
                    worker.process.kill()
                raise

    def take_turns(self) -> None:
        """Rounds of turns, one timed even if time is over; who fails takes no more."""
        seconds: dict[str, list[float]] = {name: [] for name in self.workers if name in self.prepared}
        for i in range(-self.arguments.warmup, self.arguments.rounds):
            if i != 0 and self.left(_TURNS) == 0:
                continue
            names = list(seconds)
            # No model always follows the same one, whose leavings in the caches it would inherit.
            first = i % len(names) if names else 0
            for name in names[first:] + names[:first]:
                left = self.left()
                taken = self.ask(name, "time", self.arguments.steps, None if left is None else left + _PATIENCE)
                if taken is None:
                    del seconds[name]
                elif i >= 0:
                    seconds[name] += taken
            if i >= 0:
                self.note(seconds)

    def to_profile(self) -> list[str]:
        """Those of ``--costs`` that were timed; by default GDA and the fastest of the Llamas."""
        timed = self.benchmark.content["results"][len(self.others) :]
        best = models_report.fastest(timed, LLAMAS)
        names = ["gda", *([best["model"]] if best else [])] if self.arguments.costs is None else self.arguments.costs
        return [name for name in names if any(r["model"] == name for r in timed)]

    def note(self, seconds: Mapping[str, list[float]]) -> None:
        """Set this cell's results to what all rounds so far say, and write the file."""
        peak, tokens = self.benchmark.content["peak"]["bf16_flops"], self.setup.tokens_per_step
        results = []
        for name, values in seconds.items():
            speed = report.spread([tokens / s for s in values])
            flops = self.benchmark.models[name].flops_per_token(self.setup.sizes, self.where["seq_len"])
            results.append(
                {
                    "model": name,
                    **self.where,
                    "tokens_per_step": tokens,
                    "tokens_per_second": speed._asdict(),
                    "flops_per_token": flops,
                    "model_tflops": flops * speed.median * 1e-12,
                    "mfu": flops * speed.median / peak if peak and self.where["precision"] == "bf16" else None,
                    "seconds": values,
                    **self.prepared[name],
                }
            )
        self.benchmark.content["results"] = self.others + results
        self.benchmark.save()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    names = ", ".join(PROVIDERS)
    shapes = "; ".join(f"{name} is {shape.text}" for name, shape in SHAPES.items())
    add("--shape", choices=list(SHAPES), help=f"sizes and batches; default 300m on a GPU, else small: {shapes}")
    add("--models", nargs="+", choices=list(PROVIDERS), metavar="MODEL", help=f"default: the shape's; of {names}")
    add("--seq-lens", nargs="+", type=int, help="tokens of a row; default: the shape's, 512 2048 or 4096")
    add("--precisions", nargs="+", choices=list(DTYPES), help="default: all for small, else bf16")
    add("--tokens-per-step", type=int, help="tokens of a batch, at every length; default 2048 for small, else 16384")
    add("--compile", action="store_true", help="every model's decoder layers through torch.compile")
    add("--rounds", type=int, help="rounds of turns; default 9, on a GPU 3")
    add("--steps", type=int, help="timed steps of a turn; default 1, on a GPU 5")
    add("--warmup", type=int, help="untimed rounds before them; default 1, on a GPU 0")
    add("--memory-steps", type=int, default=3, help="first steps, in which peak memory is sought; default %(default)s")
    add("--limit", type=float, help="seconds in all; what does not fit is said; default: none")
    add("--costs", nargs="*", choices=list(PROVIDERS), metavar="MODEL", help="default: gda and the fastest Llama")
    for name in ("hidden_size", "num_layers", "head_dim", "vocab_size"):
        add(f"--{name.removeprefix('num_').replace('_', '-')}", dest=name, type=int, help="default: the shape's")
    add("--intermediate-size", type=int, help="Llama's intermediate size; default: grows with the hidden size")
    add("--gda-heads", type=int, help="query heads of the first GDA; default 5/4 of Llama's, as in Motif-2-12.7B")
    add("--autocast", action="store_true", help="bf16 by torch.autocast on plain modules, without FSDP2")
    add("--profile", choices=list(PROVIDERS), metavar="MODEL", help="one model alone, with 25 rows of costs")
    return made


def resolve(arguments: argparse.Namespace) -> Setup:
    """Fill in the defaults that depend on device and shape, and check.

    Raises:
        UserError: a number or a length that has no meaning, or a model that cannot run here.
    """
    if arguments.profile:
        arguments.models = arguments.costs = [arguments.profile]
        arguments.output = arguments.output or report.ROOT / "runs" / "train_step_profile.json"
    positive = ("rounds", "steps", "memory_steps", "limit", "tokens_per_step")
    cuda, quick = cli.resolve_device(arguments, positive).type == "cuda", arguments.quick
    arguments.shape = arguments.shape or ("300m" if cuda else "small")
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
    for name, least in {"memory_steps": 2, "warmup": 0}.items():
        if getattr(arguments, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}")
    for seq_len in arguments.seq_lens:
        if seq_len < 2 or arguments.tokens_per_step % seq_len:
            raise UserError(
                f"--tokens-per-step {arguments.tokens_per_step} is not a whole number of rows of {seq_len} tokens; "
                "all lengths must have batches of the same tokens, so choose a multiple of each of --seq-lens"
            )
    arguments.models, arguments.left_out = choose(arguments.models, shape.models, arguments.device)
    fields = ("hidden_size", "num_layers", "head_dim", "vocab_size", "intermediate_size", "gda_heads")
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    if hidden_size := arguments.hidden_size:
        given.setdefault("intermediate_size", shape.sizes.intermediate_size * hidden_size // shape.sizes.hidden_size)
    sizes = dataclasses.replace(shape.sizes, **given)
    sizes = dataclasses.replace(sizes.shrunk() if quick else sizes, max_positions=max(arguments.seq_lens))
    names = ("tokens_per_step", "device", "threads", "autocast", "compile")
    return Setup(sizes, **{name: getattr(arguments, name) for name in names})


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Measure and report as the command line asks; the exit status of :func:`finish`.

    Raises:
        UserError: sizes that no model can have, or options that have no meaning.
    """
    setup = resolve(arguments)
    device = torch.device(arguments.device)
    env = cli.introduce(MODULE, device, PACKAGES, console)
    console.print(f"{arguments.shape}: {SHAPES[arguments.shape].text}", style="dim")
    name = "train_step" if arguments.shape == "small" else f"train_step_{arguments.shape}"
    benchmark = Benchmark(arguments, setup, env, cli.results_path(name, arguments, device))
    with contextlib.suppress(KeyboardInterrupt), cli.terminate_as_interrupt():
        benchmark.measure(console)
    # A time limit that ends only now need not cost the tables and the plot.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        return finish(benchmark, console)
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(benchmark: Benchmark, console: Console) -> int:
    """Write and show what was measured; 1 if one of ours failed, or it ended before it should."""
    content, path = benchmark.content, benchmark.path
    if not content["complete"]:
        console.print("stopped: the figures so far follow", style="yellow")
    benchmark.save()
    print_results(console, content, 25 if benchmark.arguments.profile else 5)
    console.print(f"figures: {path}", soft_wrap=True)
    if content["results"]:
        compiled = ", each layer compiled" if content["settings"]["compile"] else ""
        title = f"A full training step at equal parameters: {content['shape']['text']}{compiled}"
        models_report.draw(path.with_suffix(".png"), content, title)
        console.print(f"plot: {path.with_suffix('.png')}", soft_wrap=True)
    broken = [f["model"] for f in content["failed"] if not f["out_of_time"]]
    ours = any(PROVIDERS[name].library == "motifarch" for name in broken)
    return int(not content["complete"] or ours or not content["results"])


def print_results(console: Console, content: Mapping[str, Any], most: int) -> None:
    """The tables, costs with so many rows at most; what failed or was skipped; the aims."""
    models_report.print_models(console, content["models"])
    more: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "model\nGFLOP/s": lambda r: f"{r['model_tflops'] * 1e3:,.4g}",
        "MFU": lambda r: "-" if r["mfu"] is None else f"{r['mfu']:.1%}",
        "peak\nMiB": lambda r: f"{r[MEMORY] / (1 << 20):,.0f}",
        "first\nstep s": lambda r: f"{r['first_step_seconds']:.1f}",
    }
    models_report.print_cells(console, content["results"], more)
    console.print(content["peak"]["text"], soft_wrap=True)
    served: dict[str, dict[str, None]] = {}
    for r in content["results"]:
        operators = ", ".join(r["attention_operators"]) or "plain products"
        served.setdefault(operators, {})[PROVIDERS[r["model"]].label] = None
    for operators, labels in served.items():
        console.print(f"attention by {operators}: {', '.join(labels)}", soft_wrap=True)
    for p in content["profiles"]:
        total, largest = p["seconds"], p["largest"][:most]
        rows = [
            (c["name"][:48], f"{c['seconds'] * 1e3:,.2f}", f"{c['calls']:,.0f}", f"{c['share']:.1%}") for c in largest
        ]
        other = total - sum(c["seconds"] for c in largest)
        rows.append(("other", f"{other * 1e3:,.2f}", "", f"{other / total:.1%}"))
        title = f"{PROVIDERS[p['model']].label}, {models_report.describe(p)}: {p['kind']}, {total * 1e3:,.1f} ms a step"
        console.print(report.table(title, ("", "ms", "calls", "share"), rows))
    for f in content["failed"]:
        where = f"{models_report.describe(f)}, {f['during']}"
        verdict = "[yellow]stopped[/yellow]" if f["out_of_time"] else "[red]failed[/red]"
        console.print(f"{verdict} {PROVIDERS[f['model']].label} ({where}): {f['reason']}", soft_wrap=True)
    for name, reason in content["left_out"].items():
        console.print(f"skipped: {PROVIDERS[name].label}: {reason}", style="dim", soft_wrap=True)
    for cell in content["not_begun"]:
        console.print(f"[yellow]skipped[/yellow]: {models_report.describe(cell)}: the time was over", soft_wrap=True)
    models_report.print_aims(console, content["aims"])


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.exit_status(lambda: run(parser().parse_args(argv), Console()))


if __name__ == "__main__":
    sys.exit(main())
