"""Measure launch candidates on the GPU at hand and write kernels/motif_kernels/tuning/GPU.json.

    python -m benchmarks.tuning.tune               # every kernel; mostly compiling
    python -m benchmarks.tuning.tune --kernels attention_forward --limit 500
    python -m benchmarks.tuning.tune --dry-run     # the candidates; needs no GPU

For each kernel and each class of sizes that share an entry, Triton's autotuner times the present
entry and its neighbours on cases that tell (attention: causal, 4,096 tokens, four and one signal
heads for each noise head), in the pass of the public function that launches the kernel. The same
command again goes on from what was chosen. attention_backend is the backend that is the fastest
forward and backward, by the widths of the heads.

*Right first.* Every candidate's results are held to the plain formula in float64, in memory that
held NaN before. One that is wrong, does not compile, does not fit the GPU, or spills more than its
kernel's bound is left out, reported with the reason, and not timed. The fastest, by the geometric
mean over the cases, must in the same way serve further cases of its class (other masks, epilogues
and widths), else the next fastest is taken.

The table is written anew after each class, and says what it was measured on. Kernels and sizes that
were not reached keep what they had, and a table that exists keeps the other kernels. What a
kernel's fields mean, its module in kernels/motif_kernels/impl/triton/ says. Every candidate's
figures are kept in benchmarks/results/GPU/tune.json, or, with --output, beside that file.
"""

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import cli, report
from benchmarks.lib.bench import DTYPES, cpu_clock, reason_of, release_memory
from benchmarks.lib.compiling import launches_through
from benchmarks.lib.exact import Exact, fault
from benchmarks.lib.measure import Trial
from benchmarks.lib.shapes import draw_from
from benchmarks.tuning.candidates import BACKEND, Entry, Kernel, Shape, SizeClass, all_kernels, neighbours
from motif_kernels import tuning
from motifarch.errors import UserError
from motifarch.files import atomic_write

MODULE = "benchmarks.tuning.tune"
PACKAGES = ("motifarch", "torch", "triton", "flash-attn", "flash-attn-3", "flash-attn-4")
TABLES = report.ROOT / "kernels" / "motif_kernels" / "tuning"
Table = Mapping[str, Sequence[Entry]]
"""Kernel -> its entries."""


def describe(entry: Entry) -> str:
    """An entry's fields, in one line."""
    return ", ".join(f"{name} {value}" for name, value in entry.items())


@dataclass
class Outcome:
    """What was found for a class of sizes."""

    chosen: Entry | None = None
    """None if no candidate passed."""
    speedup: float | None = None
    """Geometric mean over the cases of the present entry's time by the chosen one's."""
    results: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tuner:
    """Checks and times the candidates of one class of sizes of a kernel."""

    kernel: Kernel
    device: torch.device
    others: Mapping[str, Entry]
    """What was chosen for other kernels on the same sizes, which the timed call launches too."""
    jobs: int
    """Compilations side by side."""
    say: Callable[[str], None]
    """Told of each candidate that is left out."""

    def tune(self, size_class: SizeClass, present: Entry) -> Outcome:
        """The fastest candidate of those that serve all of a class's cases."""
        outcome = Outcome()
        entries = {describe(entry): entry for entry in neighbours(present)}
        times: dict[str, list[float]] = {name: [] for name in entries}
        for shape in size_class.timed:
            trial, serves = self._prepare(shape, present, outcome)
            found = self._time(trial, serves, {name: entries[name] for name in times})
            times = {name: [*times[name], seconds] for name, seconds in found.items()}
            case = shape.case.describe()
            outcome.results += [{"entry": dict(entries[n]), "case": case, "seconds": t} for n, t in found.items()]
            del trial, serves
            release_memory()
        for name in sorted(times, key=lambda name: math.prod(times[name])):
            if all(self._prepare(shape, present, outcome)[1](entries[name]) for shape in size_class.also):
                outcome.chosen = entries[name]
                if before := times.get(describe(present)):
                    ratios = [was / now for was, now in zip(before, times[name], strict=True)]
                    outcome.speedup = statistics.geometric_mean(ratios)
                break
        return outcome

    def _prepare(
        self, shape: Shape, present: Entry, outcome: Outcome
    ) -> tuple[Callable[[Entry], Trial], Callable[[Entry], bool]]:
        """What runs a case with an entry; whether an entry serves it, or else is reported."""
        draw = draw_from(0, DTYPES[shape.case.dtype], self.device)
        inputs = shape.case.make(draw)
        exact = shape.exact(shape.case, inputs, draw)
        if exact.grad is not None:
            inputs = {name: t.requires_grad_() for name, t in inputs.items()}

        def trial(entry: Entry) -> Trial:
            return Trial(shape.function(self.device, entry), inputs, exact.grad)

        def serves(entry: Entry) -> bool:
            reason = self._fault(trial(entry), exact, entry, bounded=entry != present)
            if reason:
                case = shape.case.describe()
                outcome.left_out.append({"entry": dict(entry), "case": case, "reason": reason})
                self.say(f"  left out: {describe(entry)} at {case}: {reason}")
            return not reason

        return trial, serves

    def _fault(self, trial: Trial, exact: Exact, entry: Entry, *, bounded: bool) -> str | None:
        """Why a candidate is left out on a case, or None; a present entry's spills are not bounded.

        Raises:
            UserError: the GPU cannot go on after this launch.
        """
        launched: list[Any] = []

        def note(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            launched.append(launch(*args, **kwargs))
            return launched[-1]

        try:
            with self._in_force(entry), launches_through(note), poisoned():
                results = trial.results()
                synchronize(self.device)
        except Exception as error:  # whatever the compiler or the driver raises, the others are still measured
            try:
                synchronize(self.device)
            except RuntimeError as broken:
                raise UserError(
                    f"{self.kernel.name} with {describe(entry)} left the GPU unusable ({reason_of(broken)}); what was "
                    "found before is saved; leave this candidate out of benchmarks/tuning/candidates.py"
                ) from broken
            return reason_of(error)
        # The driver counts local memory, Triton gives it in words of 4 bytes.
        spilled = max((4 * (getattr(kernel, "n_spills", 0) or 0) for kernel in launched), default=0)
        if bounded and self.kernel.name != BACKEND and spilled > self.kernel.spilled_bytes:
            return f"it spills {spilled} bytes a thread; {self.kernel.spilled_bytes} are allowed"
        return fault(exact.errors(results), self.kernel.tolerance)

    @contextlib.contextmanager
    def _in_force(self, entry: Entry) -> Iterator[None]:
        own = {} if self.kernel.name == BACKEND else {self.kernel.name: entry}
        with tuning.overriding(**self.others, **own):
            yield

    def _time(
        self, trial: Callable[[Entry], Trial], serves: Callable[[Entry], bool], entries: Mapping[str, Entry]
    ) -> dict[str, float]:
        """Seconds of the entries that serve a case, by Triton's autotuner."""
        import triton
        from triton.runtime.errors import AutotunerError

        # One alone takes several seconds to compile. What cannot be is told when it is tried.
        warm_up = launches_through(lambda launch, *args, **kwargs: launch(*args, **{**kwargs, "warmup": True}))
        one_thread = torch.autograd.set_multithreading_enabled(False)  # the mode is that of this thread
        with (
            one_thread,
            ThreadPoolExecutor(self.jobs) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
            warm_up,
        ):
            for entry in entries.values():
                with contextlib.suppress(Exception), self._in_force(entry):
                    trial(entry).results()

        works = {name: trial(entry).works()[self.kernel.direction] for name, entry in entries.items()}
        given = next(iter(works.values())).prepare() if works else None  # the same with all entries
        configs = [triton.Config({"name": name}) for name in entries]

        class Pass:
            """What the autotuner takes for a kernel: the whole pass, with an entry in force."""

            arg_names = ("name",)

            @staticmethod
            def fn() -> None:
                """The autotuner wants a function's name."""

            @staticmethod
            def run(name: str, **_: object) -> None:
                with self._in_force(entries[name]):
                    works[name].call(given)

        def prune(found: Sequence[Any], _: object) -> list[Any]:
            return [config for config in found if serves(entries[config.kwargs["name"]])]

        def clock(function: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
            return [1e3 * seconds for seconds in cpu_clock(function, 0)] * len(quantiles)

        # On a GPU its clock is its own, triton.testing.do_bench.
        do_bench = None if self.device.type == "cuda" else clock
        configs *= 2 if len(configs) == 1 else 1  # it does not time a single one
        pruning = {"early_config_prune": prune}
        tuner = triton.autotune(configs, [], prune_configs_by=pruning, do_bench=do_bench)(Pass)
        try:
            tuner.run()
        except AutotunerError:  # none was left
            return {}
        found = {config.kwargs["name"]: 1e-3 * timing[0] for config, timing in tuner.configs_timings.items()}
        return {name: seconds for name, seconds in found.items() if math.isfinite(seconds)}


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, and hear of what failed there."""
    if device.type == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Within, new tensors hold NaN until they are written: what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills new memory in this mode alone
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# --- The table ------------------------------------------------------------------------------------


def entry_at(entries: Sequence[Entry], size: int | None) -> Entry:
    """The entry that serves a size, without its bound; None is beyond every bound."""
    found = next(e for e in entries if e["up_to"] is None or (size is not None and size <= e["up_to"]))
    return {name: value for name, value in found.items() if name != "up_to"}


def splice(present: Sequence[Entry], classes: Sequence[SizeClass], chosen: Mapping[int | None, Entry]) -> list[Entry]:
    """A kernel's entries with the chosen classes' replaced; equal neighbours become one."""

    def order(bound: int | None) -> float:
        return math.inf if bound is None else bound

    spliced: list[Entry] = []
    for bound in sorted({e["up_to"] for e in present} | {c.up_to for c in classes}, key=order):
        own = next((c for c in classes if order(bound) <= order(c.up_to)), None)
        fields = (chosen.get(own.up_to) if own else None) or entry_at(present, bound)
        if spliced and {k: v for k, v in spliced[-1].items() if k != "up_to"} == fields:
            spliced.pop()
        spliced.append({"up_to": bound, **fields})
    return spliced


def read_table(path: Path, shipped: Path) -> dict[str, Any]:
    """The table at ``path``, else the one shipped for the GPU, else an empty one."""
    found = next((p for p in (path, shipped) if p.exists()), None)
    return json.loads(found.read_text(encoding="utf-8")) if found else {"kernels": {}}


def write_table(path: Path, shipped: Path, gpu: str, source: str, kernels: Table) -> None:
    """Write these kernels' entries into the table, one a line.

    What else :func:`read_table` finds stays; "sources" then says for each kernel of those where it
    came from. Of the GPU's name its memory is left out: "NVIDIA H100" serves all of them.
    """
    old = read_table(path, shipped)
    sources = {n: old.get("sources", {}).get(n, old["source"]) for n in old["kernels"] if n not in kernels}
    gpu = old.get("gpu", re.sub(r"[ -]+(\d+GB|HBM\d\w*)\b.*", "", gpu))
    head = {"gpu": gpu, "source": source, **({"sources": sources} if sources else {})}
    parts = [
        f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(dict(e))}" for e in entries) + "\n    ]"
        for name, entries in {**old["kernels"], **kernels}.items()
    ]
    text = json.dumps(head, indent=2).removesuffix("\n}") + ',\n  "kernels": {\n' + ",\n".join(parts) + "\n  }\n}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(text)


def present_table(path: Path, shipped: Path, gpu: str) -> dict[str, list[Entry]]:
    """What launches take now: the table to be written over what is shipped for the GPU."""
    backend = [{"up_to": None, "backend": "triton"}]  # what "auto" takes where no table says
    return {BACKEND: backend, **tuning.merged_table(gpu), **read_table(path, shipped)["kernels"]}


# --- The command line -----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--kernels", nargs="+", choices=list(all_kernels()), help="default: all")
    add("--limit", type=float, help="seconds after which nothing new is begun; default none")
    add("--jobs", type=int, default=max(1, min(12, cores - 1)), help="compilations side by side; default %(default)s")
    add("--dry-run", action="store_true", help="print the candidates and measure nothing; needs no GPU")
    return made


def dry_run(kernels: Sequence[Kernel], table: Table, console: Console) -> None:
    """Print what would be tried."""
    for kernel in kernels:
        for size_class in kernel.classes:
            present = entry_at(table[kernel.name], size_class.up_to)
            candidates = neighbours(present)
            console.print(f"{kernel.describe(size_class)}: {len(candidates)} candidates", style="bold")
            for word, shapes in (("timed", size_class.timed), ("must serve", size_class.also)):
                for shape in shapes:
                    console.print(f"  {word}: {shape.case.describe()}", style="dim", soft_wrap=True)
            for entry in candidates:
                console.print(f"  {describe(entry)}{' (present)' if entry is present else ''}", soft_wrap=True)


def run(arguments: argparse.Namespace, kernels: Sequence[Kernel], device: torch.device, console: Console) -> int:
    """Tune the kernels; the table and the log are written anew after each class.

    Returns:
        The exit status: 1 if a class has no candidate that passed, or if it was stopped before the
        end.
    """
    env = report.environment(MODULE, device, PACKAGES)
    console.print(report.describe(env), style="dim")
    if warning := report.busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    slug = cli.device_slug(device)
    shipped = TABLES / f"{slug}.json"
    path = arguments.output or shipped
    log_path = path.with_name(f"{path.stem}_log.json") if arguments.output else report.RESULTS / slug / "tune.json"
    before = present_table(path, shipped, env["device"])
    source = f"measured on {env['device']}: python -m {MODULE}, {report.describe(env)}"
    content: dict[str, Any] = {"benchmark": "tune", "format": 2, "environment": env, "outcomes": [], "not_reached": []}
    deadline = math.inf if arguments.limit is None else time.monotonic() + arguments.limit
    todo = [(kernel, i) for kernel in kernels for i in range(len(kernel.classes))]
    chosen: dict[str, dict[int | None, Entry]] = {}

    def say(text: str) -> None:
        console.print(text, style="yellow", soft_wrap=True)

    with contextlib.suppress(KeyboardInterrupt), cli.terminate_as_interrupt():
        while todo and time.monotonic() < deadline:
            kernel, index = todo[0]
            size_class, up_to = kernel.classes[index], kernel.classes[index].up_to
            console.print(kernel.describe(size_class))
            present = entry_at(before[kernel.name], up_to)
            # Backends compete with the entries that were just chosen.
            others = {n: of[up_to] for n, of in chosen.items() if kernel.name == BACKEND and up_to in of}
            outcome = Tuner(kernel, device, others, arguments.jobs, say).tune(size_class, present)
            content["outcomes"].append({"kernel": kernel.name, "up_to": up_to, **vars(outcome)})
            if outcome.chosen:
                chosen.setdefault(kernel.name, {})[up_to] = outcome.chosen
                tables = {n: splice(before[n], all_kernels()[n].classes, of) for n, of in chosen.items()}
                write_table(path, shipped, env["device"], source, tables)
            speedup = f", {outcome.speedup:.2f} times as fast as before" if outcome.speedup else ""
            console.print(f"  {describe(outcome.chosen) if outcome.chosen else 'none passed: as before'}{speedup}")
            report.write_json(log_path, content)
            todo.pop(0)
    content["not_reached"] = [kernel.describe(kernel.classes[i]) for kernel, i in todo]
    report.write_json(log_path, content)
    if todo:
        console.print(f"not reached, as before: {'; '.join(content['not_reached'])}", style="yellow", soft_wrap=True)
    if chosen:
        console.print(f"table: {path}", soft_wrap=True)
    console.print(f"figures: {log_path}", soft_wrap=True)
    stopped = bool(todo) and time.monotonic() < deadline
    return int(stopped or any(not o["chosen"] for o in content["outcomes"]))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)

    def start() -> int:
        device = cli.resolve_device(arguments, ("limit", "jobs"))
        kernels = [k for name, k in all_kernels().items() if name in (arguments.kernels or all_kernels())]
        if arguments.dry_run or arguments.quick:
            gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
            shipped = TABLES / f"{cli.device_slug(device)}.json"
            dry_run(kernels, present_table(arguments.output or shipped, shipped, gpu), Console())
            return 0
        if device.type != "cuda":
            raise UserError(
                "torch sees no CUDA GPU here, and launch tables are measured on one; --dry-run prints the candidates"
            )
        return run(arguments, kernels, device, Console())

    return cli.exit_status(start)


if __name__ == "__main__":
    sys.exit(main())
