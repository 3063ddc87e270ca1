"""Measure launch candidates on the GPU at hand and write kernels/motif_kernels/tuning/GPU.json.

    python -m benchmarks.tuning.tune               # every kernel
    python -m benchmarks.tuning.tune --kernels attention_forward --limit 500
    python -m benchmarks.tuning.tune --dry-run     # the candidates; needs no GPU

For each kernel and class of sizes, the present entry, its neighbours and for attention all tiles
that its products fit are timed in the pass that launches the kernel; the fastest over all cases is
taken. The command again goes on from there.

Compiling takes most of the time. Processes on all cores compile, breadth first: the present entries
and a few candidates of the sizes that matter most, one of each other, and again. The GPU measures
meanwhile what is compiled, where the static model (benchmarks.lib.predict) ranks it the best first.
Each candidate's results are first held to the plain formula, in memory that held NaN; one that is
wrong, does not launch, spills in an inner loop or is predicted to be far slower is left out, with
the reason, and the one taken must serve further cases too. The table is written whenever another
entry is taken, keeps what was not reached, and names what was ("measured"). All figures, measured
and predicted, go to benchmarks/results/GPU/tune.json or, with --output, beside that file.
"""

import argparse
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from benchmarks.lib.bench import reason_of
from benchmarks.lib.compile_pool import compile_pool
from benchmarks.lib.run import PACKAGES
from benchmarks.tuning import ahead
from benchmarks.tuning.candidates import candidates
from benchmarks.tuning.kernels import BACKEND, Entry, Kernel, all_kernels
from benchmarks.tuning.schedule import Size, Verdict, explore
from benchmarks.tuning.table import LaunchTable
from benchmarks.tuning.trial import Trials, describe
from motifarch.errors import UserError

MODULE = "benchmarks.tuning.tune"
TABLES = report.ROOT / "kernels" / "motif_kernels" / "tuning"


@dataclass
class Bench:
    """Compiles and measures for :func:`benchmarks.tuning.schedule.explore`, and keeps the table."""

    sizes: Sequence[Size]
    trials: Trials
    table: LaunchTable
    pool: Pool | None
    """None compiles where it measures."""
    content: dict[str, Any]
    log: Path
    source: str
    console: Console

    def compile(self, size: Size, entry: Entry, further: bool) -> Callable[[], Verdict | None]:
        """See :class:`benchmarks.tuning.schedule.Bench`."""
        if self.pool is None:
            return Verdict
        major, minor = torch.cuda.get_device_capability(self.trials.device)
        gpu = torch.cuda.get_device_name(self.trials.device)
        asked = (size.kernel.name, size.up_to, entry, further, 10 * major + minor, gpu)
        answer = self.pool.apply_async(ahead.compile_candidate, asked)
        gone = time.monotonic() + 2 * ahead.LONGEST

        def ask() -> Verdict | None:
            if answer.ready():
                try:
                    return answer.get()
                except Exception as error:  # of a process that could not answer
                    return Verdict(reason=reason_of(error))
            return Verdict(reason="the compiler crashed") if time.monotonic() > gone else None

        return ask

    def others(self, size: Size) -> dict[str, Entry]:
        """Backends compete with the entries that were chosen by then."""
        chosen = [s for s in self.sizes if s.up_to == size.up_to and s.chosen is not None and s.kernel.name != BACKEND]
        return {s.kernel.name: s.entries[s.chosen or 0] for s in chosen} if size.kernel.name == BACKEND else {}

    def measure(self, size: Size, entry: Entry) -> list[float] | str:
        """See :class:`benchmarks.tuning.schedule.Bench`."""
        return self.trials.measure(size.kernel, size.up_to, entry, self.others(size))

    def fault(self, size: Size, entry: Entry) -> str | None:
        """See :class:`benchmarks.tuning.schedule.Bench`."""
        found = (
            self.trials.fault(size.kernel, s, entry, self.others(size)) for s in size.kernel.classes[size.up_to][1]
        )
        return next(filter(None, found), None)

    def note(self, size: Size, i: int | None) -> None:
        """Write the log and, for a choice, the table; a line for people."""
        text = f"{size.kernel.name}, up to {size.up_to or 'any'} bytes: "
        if i is None and size.chosen is not None:
            chosen = size.entries[size.chosen]
            self.table.choose(size.kernel, size.up_to, chosen, self.source)
            text += f"takes {describe(chosen)}"
            text += f", {size.speedup:.2f} times as fast as before" if size.chosen and size.speedup else ""
        elif i in size.reasons:
            text += f"left out: {describe(size.entries[i])}: {size.reasons[i]}"
        elif i is not None:
            milliseconds = " and ".join(f"{1e3 * seconds:.4g}" for seconds in size.times[i])
            text += f"{describe(size.entries[i])}: {milliseconds} ms"
        self.console.print(text, soft_wrap=True, highlight=False)
        self.write()

    def write(self) -> None:
        """The log as it is now."""
        known = [size for size in self.sizes if size.times or size.reasons]
        self.content["outcomes"] = [size.report() for size in known]
        self.content["not_reached"] = [
            {"kernel": size.kernel.name, "up_to": size.up_to} for size in self.sizes if size.chosen is None
        ]
        report.write_json(self.log, self.content)


@contextlib.contextmanager
def counted(content: dict[str, Any]) -> Iterator[None]:
    """Within, ``content`` counts what is compiled in this process, while the GPU waits: a kernel
    that was launched in another way than it was compiled ahead.
    """
    import triton

    def listen(*, cache_hit: bool, **_: Any) -> None:
        content["compiled_while_measuring"] += not cache_hit

    content["compiled_while_measuring"] = 0
    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        triton.knobs.compilation.listener = None


@contextlib.contextmanager
def compilers(arguments: argparse.Namespace, device: torch.device) -> Iterator[Pool | None]:
    """Processes that compile for a GPU; none for a CPU, where nothing is compiled."""
    if device.type != "cuda":
        yield None
        return
    with compile_pool(arguments.jobs, torch.cuda.get_device_properties(device).multi_processor_count) as pool:
        yield pool


def run(arguments: argparse.Namespace, kernels: Sequence[Kernel], device: torch.device, console: Console) -> int:
    """Tune the kernels, or with --dry-run print what would be tried.

    Returns:
        The exit status: 1 if a class has no candidate that passed, or if it was stopped before the
        end.
    """
    deadline = math.inf if arguments.limit is None else time.monotonic() + arguments.limit
    slug = cli.device_slug(device)
    path = arguments.output or TABLES / f"{slug}.json"
    env = cli.introduce(MODULE, device, PACKAGES, console)
    table = LaunchTable(path, TABLES / f"{slug}.json", env["device"])
    log = path.with_name(f"{path.stem}_log.json") if arguments.output else report.RESULTS / slug / "tune.json"
    source = f"measured on {env['device']}: python -m {MODULE}, {report.describe(env)}"
    used = [kernel for kernel in kernels if table.present[kernel.name] is not None]
    sizes = [
        Size(kernel, up_to, candidates(kernel.name, table.entry(kernel.name, up_to)))
        for kernel in used
        for up_to in kernel.classes
    ]
    if arguments.dry_run:
        for size in sizes:
            case = size.kernel.classes[size.up_to][0][0].case.describe()
            tried = "".join(f"\n  {describe(entry)}" for entry in size.entries)
            text = f"{size.kernel.name}, up to {size.up_to or 'any'} bytes, {case} and the like"
            console.print(f"{text}{tried} (the first is in force)", soft_wrap=True)
        return 0
    content: dict[str, Any] = {"benchmark": "tune", "format": 3, "environment": env, "outcomes": [], "not_reached": []}
    stopped = True
    ends = contextlib.suppress(KeyboardInterrupt)
    with ends, cli.terminate_as_interrupt(), counted(content), compilers(arguments, device) as pool:
        bench = Bench(sizes, Trials(device), table, pool, content, log, source, console)
        bench.write()
        explore(sizes, bench, jobs=arguments.jobs, deadline=deadline)
        stopped = False
    for size in sizes:
        if size.chosen is None:
            console.print(
                f"not reached, as before: {size.kernel.name}, up to {size.up_to or 'any'} bytes", style="yellow"
            )
    chosen = any(size.chosen is not None for size in sizes)
    console.print(f"{f'table: {path}; ' if chosen else ''}figures: {log}", soft_wrap=True)
    return int(stopped or any(size.chosen is None and size.reasons for size in sizes))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    add("--kernels", nargs="+", choices=list(all_kernels()), help="default: all")
    add("--limit", type=float, help="seconds after which nothing new is begun; default none")
    jobs = max(1, (os.cpu_count() or 1) - 2)
    add("--jobs", type=int, default=jobs, help="compilations side by side; default %(default)s")
    add("--dry-run", action="store_true", help="print the candidates and measure nothing; needs no GPU")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)

    def start() -> int:
        device = cli.resolve_device(arguments, ("limit", "jobs"))
        arguments.dry_run |= arguments.quick
        if device.type != "cuda" and not arguments.dry_run:
            raise UserError(
                "torch sees no CUDA GPU here, and launch tables are measured on one; --dry-run prints the candidates"
            )
        kernels = [k for name, k in all_kernels().items() if name in (arguments.kernels or all_kernels())]
        return run(arguments, kernels, device, Console())

    return cli.exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
