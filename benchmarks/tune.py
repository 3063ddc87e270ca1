"""Measure launch candidates on the GPU at hand and write its launch table,
kernels/motif_kernels/tuning/GPU.json.

    python -m benchmarks.tune                                        # every kernel; most of the time goes to compiling
    python -m benchmarks.tune --kernels attention_forward --limit 500
    python -m benchmarks.tune --dry-run                              # the candidates; needs no GPU

For each kernel and each class of sizes that share an entry, candidates are timed on one or two
problems that tell (attention: causal, 4,096 tokens, four and one signal heads for each noise head),
beginning with the entry that the GPU has now. Then attention_backend: which backend is the fastest
forward and backward, by the widths of the heads.

*Right first.* Every candidate's results are held to those of the present entry, in memory that held
NaN before. One that differs, does not compile, does not fit the GPU, or spills more than its
kernel's bound is refused, reported with the reason, and not timed. The fastest must in the same way
serve further problems of its class (other masks, epilogues and widths), else the next fastest is
taken.

*Time.* Candidates take turns, in an order that rotates; a candidate's figure is its median. It is
the GPU's time with a cold L2 cache and the launches queued (timing.py). Over a class's problems,
the geometric mean of the ratios to the present entry decides.

The table is written anew after each class. Kernels and sizes that were not reached keep what they
had, and a table that exists keeps the other kernels. What a kernel's fields mean, its module in
kernels/motif_kernels/impl/triton/ says. Every candidate's figures are kept in
benchmarks/results/GPU/tune.json, or, with --output, beside that file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels import device_slug, terminate_as_interrupt
from benchmarks.lib import report
from benchmarks.timing import clock_for
from benchmarks.tune_candidates import Entry, Kernel, SizeClass, all_kernels, quick
from benchmarks.tune_launch import Compilers, OutOfTimeError, Table
from benchmarks.tune_measure import SHORT_NAMES, Bench, Outcome, all_candidates, describe
from benchmarks.tune_table import TABLES, gpu_name_part, present_table, splice, write_table
from motifarch.errors import UserError

PACKAGES = ("motifarch", "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")


def describe_class(kernel: Kernel, size_class: SizeClass) -> str:
    """In words."""
    where = "the rest" if size_class.up_to is None else f"up to {size_class.up_to:,} bytes"
    return f"{kernel.name}, {where}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--kernels", nargs="+", choices=list(all_kernels()), help="default: all")
    add("--seconds", type=float, default=0.1, help="of measuring for each candidate; default %(default)s")
    add("--limit", type=float, help="seconds after which nothing new is begun; default none")
    add("--jobs", type=int, default=max(1, min(12, cores - 1)), help="processes that compile; default %(default)s")
    add("--output", type=Path, help="the table; default kernels/motif_kernels/tuning/GPU.json")
    add("--dry-run", action="store_true", help="print the candidates and measure nothing; needs no GPU")
    add("--quick", action="store_true", help="a smoke test: tiny sizes, few candidates; runs on a CPU too, interpreted")
    return made


def dry_run(kernels: Sequence[Kernel], table: Table, console: Console) -> None:
    """Print what would be tried."""
    for kernel in kernels:
        for size_class in kernel.classes:
            candidates = all_candidates(kernel, size_class, table)
            console.print(f"{describe_class(kernel, size_class)}: {len(candidates)} candidates", style="bold")
            for word, problems in (("timed", size_class.timed), ("must serve", size_class.also)):
                for problem in problems:
                    console.print(f"  {word}: {problem.describe()}", style="dim", soft_wrap=True)
            for entry in candidates:
                note = " (present)" if entry is candidates[0] else ""
                console.print(f"  {describe(entry)}{note}", soft_wrap=True)


def print_outcomes(console: Console, outcomes: Sequence[tuple[Kernel, SizeClass, Outcome]]) -> None:
    """The tables at the end, one for each kernel."""
    rows: dict[str, list[tuple[str, ...]]] = {}
    for kernel, size_class, outcome in outcomes:
        row = (
            "the rest" if size_class.up_to is None else f"{size_class.up_to:,}",
            describe(outcome.chosen, SHORT_NAMES) if outcome.chosen else "none passed: as before",
            f"{outcome.seconds * 1e6:,.1f}" if outcome.seconds else "",
            f"{outcome.present_seconds * 1e6:,.1f}" if outcome.present_seconds else "",
            f"{outcome.speedup:.2f}" if outcome.speedup else "",
        )
        rows.setdefault(kernel.name, []).append(row)
    for name, found in rows.items():
        headings = ("up to\nbytes", "chosen", "time\nµs", "present\nµs", "speed-\nup")
        console.print(report.table(name, headings, found, text_columns=2))


def run(arguments: argparse.Namespace, kernels: Sequence[Kernel], device: torch.device, console: Console) -> int:
    """Tune the kernels; the table and the log are written anew after each class.

    Returns:
        The exit status: 1 if a class has no candidate that passed, or if it was stopped before the
        end.
    """
    env = report.environment("benchmarks.tune", device, PACKAGES)
    console.print(report.describe(env), style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    gpu, slug = env["device"], device_slug(device)
    path = arguments.output or (
        report.ROOT / "runs" / "tune_quick.json" if arguments.quick else TABLES / f"{slug}.json"
    )
    beside = arguments.output or arguments.quick
    log_path = path.with_name(f"{path.stem}_log.json") if beside else report.RESULTS / slug / "tune.json"
    shipped = TABLES / f"{slug}.json"
    table = present_table(path, shipped, gpu)
    options = [f"--kernels {shlex.join(arguments.kernels)}"] if arguments.kernels else []
    options += [f"--seconds {arguments.seconds:g}", *(["--quick"] if arguments.quick else [])]
    source = f"python -m benchmarks.tune {' '.join(options)}: {report.describe(env)}"

    log: dict[str, Any] = json.loads(log_path.read_text(encoding="utf-8")) if log_path.exists() else {"kernels": {}}
    log |= {"benchmark": "tune", "format": 1, "complete": False, "environment": env}
    log["settings"] = {name: getattr(arguments, name) for name in ("kernels", "seconds", "limit", "jobs", "quick")}
    todo = [(kernel, size_class) for kernel in kernels for size_class in kernel.classes]
    outcomes: list[tuple[Kernel, SizeClass, Outcome]] = []
    tuned: dict[str, dict[int | None, Entry]] = {}
    before = dict(table)

    def keep(kernel: Kernel, size_class: SizeClass, outcome: Outcome) -> None:
        """Put what was found into the table, which later kernels launch with, and into the
        files.
        """
        outcomes.append((kernel, size_class, outcome))
        others = [c for c in log["kernels"].get(kernel.name, ()) if c["up_to"] != size_class.up_to]
        log["kernels"][kernel.name] = [*others, {"up_to": size_class.up_to, "source": source, **vars(outcome)}]
        if outcome.chosen:
            tuned.setdefault(kernel.name, {})[size_class.up_to] = outcome.chosen
            table[kernel.name] = splice(before[kernel.name], kernel.classes, tuned[kernel.name])
            write_table(path, shipped, gpu_name_part(gpu), source, {name: table[name] for name in tuned})
        report.write_json(log_path, log)

    bench = Bench(device, clock_for(device), arguments.seconds, 2 if arguments.quick else 5, lambda _: None)
    if arguments.limit is not None:
        bench.deadline = time.monotonic() + arguments.limit
    if device.type == "cuda" and arguments.jobs > 1:
        bench.compilers = Compilers(arguments.jobs)
    failure: UserError | None = None
    begun = 0
    try:
        with contextlib.suppress(KeyboardInterrupt), report.progress(console) as bar, terminate_as_interrupt():
            bench.say = lambda text: bar.console.print(text, style="yellow", soft_wrap=True)
            task = bar.add_task("", total=len(todo))
            for kernel, size_class in todo:
                if time.monotonic() >= bench.deadline:
                    break
                description = describe_class(kernel, size_class)
                bar.update(task, description=description)
                if not console.is_terminal:  # a log file shows no bar while it moves
                    console.print(description)
                try:
                    outcome = bench.tune(kernel, size_class, table)
                except OutOfTimeError:
                    break
                except UserError as error:
                    failure = error
                    break
                keep(kernel, size_class, outcome)
                begun += 1
                bar.advance(task)
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            log["complete"] = begun == len(todo)
    finally:
        if bench.compilers:
            bench.compilers.close()
    not_reached = [describe_class(kernel, size_class) for kernel, size_class in todo[begun:]]
    log["not_reached"] = not_reached
    report.write_json(log_path, log)
    print_outcomes(console, outcomes)
    if not_reached:
        console.print(f"not reached, as before: {'; '.join(not_reached)}", style="yellow", soft_wrap=True)
    if tuned:
        console.print(f"table: {path}", soft_wrap=True)
    console.print(f"figures: {log_path}", soft_wrap=True)
    if failure:
        raise failure
    stopped = bool(not_reached) and time.monotonic() < bench.deadline
    return int(stopped or any(outcome.chosen is None for _, _, outcome in outcomes))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    console = Console()
    try:
        for name in ("seconds", "limit", "jobs"):
            value = getattr(arguments, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name} is {value}; it must be above 0")
        cuda = torch.cuda.is_available()
        device = torch.device("cuda" if cuda else "cpu")
        kernels = [k for name, k in all_kernels().items() if name in (arguments.kernels or all_kernels())]
        if arguments.quick:
            kernels = [quick(kernel) for kernel in kernels]
            if not cuda:
                os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels' modules are imported
        if arguments.dry_run:
            gpu = torch.cuda.get_device_name(device) if cuda else ""
            shipped = TABLES / f"{device_slug(device)}.json"
            dry_run(kernels, present_table(arguments.output or shipped, shipped, gpu), console)
            return 0
        if not cuda and not arguments.quick:
            raise UserError(
                "torch sees no CUDA GPU here, and launch tables are measured on one; --dry-run prints the candidates"
            )
        return run(arguments, kernels, device, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
