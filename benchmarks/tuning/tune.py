"""Measure launch candidates on the GPU at hand and write kernels/motif_kernels/tuning/GPU.json.

    python -m benchmarks.tuning.tune               # every kernel; mostly compiling
    python -m benchmarks.tuning.tune --kernels attention_forward --limit 500
    python -m benchmarks.tuning.tune --dry-run     # the candidates; needs no GPU

For each kernel and class of sizes, Triton's autotuner times the present entry and its neighbours in
the pass that launches the kernel; the fastest over all cases is taken. The command again goes on
from there. Attention's candidates are all tiles that its products fit; on Hopper those are timed
that the static model (benchmarks.lib.predict) puts first, --best of them. Each candidate's results
are first held to the plain formula, in memory that held NaN; one that is wrong, does not launch or
spills in an inner loop is left out, with the reason, and the one taken must serve further cases
too. The table is written after each class, and keeps what was not reached. All
figures go to benchmarks/results/GPU/tune.json or, with --output, beside that file.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.lib import cli, report
from benchmarks.lib.bench import DTYPES, cpu_clock, reason_of, release_memory
from benchmarks.lib.compiling import executed_spills, launches_through
from benchmarks.lib.exact import Exact, exact_results, fault
from benchmarks.lib.measure import Trial
from benchmarks.lib.providers import Function
from benchmarks.lib.run import PACKAGES
from benchmarks.lib.shapes import AttentionCase, Case, Layout, RowCase, draw_from
from benchmarks.ops import attention, combine, decode, poly_norm
from benchmarks.tuning.candidates import Launched, by_predicted_time, candidates
from motif_kernels import tuning
from motif_kernels.impl.constants import POWER_SCALE
from motifarch.errors import UserError
from motifarch.files import atomic_write

MODULE = "benchmarks.tuning.tune"
TABLES = report.ROOT / "kernels" / "motif_kernels" / "tuning"
BACKEND = "attention_backend"
Entry = Mapping[str, Any]


# --- What is tuned, on which cases ----------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A case, and how motif_kernels is called on it."""

    case: Case
    function: Callable[[torch.device, Entry], Function]
    """Of an entry: the choice of a backend is an argument of the call."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or the choice of a backend, as the launch tables list it."""

    name: str
    direction: str
    """The pass of the public function that has this kernel in it, and is timed."""
    classes: Mapping[int | None, tuple[Sequence[Shape], Sequence[Shape]]]
    """Bound of the sizes that share an entry -> the cases that decide, and further ones to
    serve.
    """
    tolerance: float


# Bound -> widths (D, Dv) that are timed, and further ones that the class must serve.
_WIDTHS: dict[int | None, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
    256: ((64, 64), ()),
    384: ((64, 128), ()),
    512: ((128, 128), ()),
    768: ((128, 256), ((96, 192), (192, 128))),
    None: ((256, 256), ()),
}


def _attention(d: int, dv: int, ratio: int, noise: int, length: int, batch: int = 2, **rest: Any) -> Shape:
    backend = rest.pop("backend", "triton")
    layout = Layout(f"({d}, {dv}), {ratio * noise}:{noise} heads", ratio * noise, noise, noise, d, dv, **rest)
    documents = (length,) * batch if layout.packed else ()
    case = AttentionCase("", layout, "bf16", length, 1 if documents else batch, noise, documents)
    return Shape(case, lambda device, entry: attention.ours(case, entry.get("backend", backend), device))


def _attention_kernel(name: str, direction: str) -> Kernel:
    classes = {}
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # Spills and shared memory depend on the mask, the epilogue and the mode.
        also = (
            _attention(d, dv, 1, 2, 1000, window=300, packed=True, shared_keys=True),
            _attention(d, dv, 3, 2, 1000, gate=True, backend="triton_fast"),
            *(_attention(*widths, 3, 2, 1000) for widths in others),
        )
        classes[up_to] = (_attention(d, dv, 4, 8, 4096), _attention(d, dv, 1, 1024 // d, 4096)), also
    return Kernel(name, direction, classes, attention.TOLERANCES["bf16"])


def _decode(d: int, dv: int, ratio: int, noise: int, length: int, batch: int) -> Shape:
    layout = Layout(f"({d}, {dv}), {ratio * noise}:{noise} heads", ratio * noise, noise, noise, d, dv)
    case = decode.DecodeCase("", layout, "bf16", length, batch, noise)
    return Shape(case, lambda device, entry: decode.ours(case, "triton", device))


def _decoding_kernel() -> Kernel:
    classes = {}
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # A cache that fills the GPU by its length, and one that does by its rows.
        timed = _decode(d, dv, 4, 8, 32768, 1), _decode(d, dv, 1, 1024 // d, 4096, 16)
        classes[up_to] = timed, tuple(_decode(*w, 3, 2, 1000, 3) for w in ((d, dv), *others))
    return Kernel("decoding_split", "forward", classes, attention.TOLERANCES["bf16"])


def _row(case: RowCase) -> Shape:
    return Shape(case, lambda device, entry: lambda t: case.ours(*t.values()))


def _poly_norm(rows: int, columns: int) -> Shape:
    return _row(poly_norm.case("mul_poly_norm", "bf16", rows, columns))


def _sum_formula(x: Tensor, grad: Tensor) -> Tensor:
    """What each process of a group computes on its part of a row: sums of powers and products."""
    x = x * POWER_SCALE
    return torch.stack([t.sum(-1) for t in (x**6, x**4, x**2, grad * x**3, grad * x**2, grad * x, grad)], dim=-1)


def _ours_sums(x: Tensor, grad: Tensor) -> Tensor:
    from motif_kernels.impl.triton import poly_norm as run

    products = run.product_sums(grad, x, None, hidden_clamp=None)
    return torch.cat([run.power_sums(x, hidden_clamp=None), products]).T


def _sums(rows: int, columns: int) -> Shape:
    case = RowCase(
        function="sums of PolyNorm",
        dtype="bf16",
        rows=rows,
        columns=columns,
        forward_bytes=3 * 2 * rows * columns,
        backward_bytes=0,
        make=lambda draw: {"x": draw(rows, columns), "grad": draw(rows, columns)},
        formula=_sum_formula,
        ours=_ours_sums,
        directions=("forward",),
    )
    return _row(case)


def _row_kernel(name: str, direction: str, shape: Callable[[int, int], Shape], bounds: Sequence[int]) -> Kernel:
    classes = {}
    for up_to in (*bounds, None):
        columns = (up_to or 2 * bounds[-1]) // 2
        # Tiles are powers of two.
        timed = tuple(shape((1 << 25) // n, n) for n in (columns, columns * 11 // 16))
        classes[up_to] = timed, (shape(7, columns - 3 if up_to else bounds[-1] + 5),)
    return Kernel(name, direction, classes, 0.06)


def _combine(width: int, ratio: int, noise_heads: int) -> Shape:
    layout = combine.Layout(f"{ratio * noise_heads}:{noise_heads} heads of {width}", ratio, width, 0, "sub-norm")
    return _row(combine.case(layout, "sub-norm", "bf16", 8192, width * ratio * noise_heads))


def _prepare(width: int, ratio: int, noise_heads: int) -> Shape:
    # Over short sequences: only the tokens matter to this kernel, and the others take little time.
    return _attention(64, width, ratio, noise_heads, 256, batch=32)


def _head_kernel(name: str, direction: str, shape: Callable[[int, int, int], Shape], tolerance: float) -> Kernel:
    classes = {}
    for up_to, width in ((128, 64), (256, 128), (None, 256)):
        timed = shape(width, 4, 8), shape(width, 1, 2048 // width)
        classes[up_to] = timed, (shape(width if up_to else 192, 3, 2),)
    return Kernel(name, direction, classes, tolerance)


def all_kernels() -> dict[str, Kernel]:
    """By name, in the order in which they are tuned: what users wait for most first."""
    kernels = [
        _attention_kernel("attention_forward", "forward"),
        _attention_kernel("attention_forward_tma", "forward"),
        _attention_kernel("attention_backward_keys", "backward"),
        _attention_kernel("attention_backward_queries", "backward"),
        _head_kernel("attention_prepare", "backward", _prepare, 0.15),
        _attention_kernel(BACKEND, "both"),
        _decoding_kernel(),
        _row_kernel("poly_norm_forward", "forward", _poly_norm, (2048, 4096, 8192, 16384, 32768, 65536)),
        _row_kernel("poly_norm_backward", "backward", _poly_norm, (2048, 4096, 8192, 16384, 32768)),
        _row_kernel("poly_norm_sums", "forward", _sums, (2048,)),
        _head_kernel("diff_combine_forward", "forward", _combine, 0.06),
        _head_kernel("diff_combine_backward", "backward", _combine, 0.06),
    ]
    return {kernel.name: kernel for kernel in kernels}


# --- Check and time -------------------------------------------------------------------------------


def describe(entry: Entry) -> str:
    """An entry's fields, in one line."""
    return ", ".join(f"{name} {value}" for name, value in entry.items())


@dataclass
class Tuner:
    """Checks and times the candidates of one class of sizes of a kernel."""

    kernel: Kernel
    device: torch.device
    present: Entry
    others: Mapping[str, Entry]
    """What was chosen for other kernels on the same sizes, which the timed call launches too."""
    jobs: int
    """Compilations side by side."""
    best: int = 6
    """Candidates that are timed, of those that the static model ranks."""

    def tune(self, timed: Sequence[Shape], also: Sequence[Shape]) -> dict[str, Any]:
        """What is the fastest that serves all cases (None if nothing does), and all figures."""
        entries = {describe(entry): entry for entry in candidates(self.kernel.name, self.present)}
        results: list[dict[str, Any]] = []
        self.left_out: list[dict[str, Any]] = []
        times: dict[str, list[float]] = {name: [] for name in entries}
        for shape in timed:
            found = self.time(self.trials(shape), {name: entries[name] for name in times}, shape.case)
            times = {name: [*times[name], seconds] for name, seconds in found.items()}
            case = shape.case.describe()
            results += [{"entry": dict(entries[n]), "case": case, "seconds": t} for n, t in found.items()]
            release_memory()
        chosen, speedup = None, None
        for name in sorted(times, key=lambda name: math.prod(times[name])):
            if all(self.serves(self.trials(shape), entries[name]) for shape in also):
                chosen = entries[name]
                if before := times.get(describe(self.present)):
                    speedup = statistics.geometric_mean(was / now for was, now in zip(before, times[name], strict=True))
                break
        return {"chosen": chosen, "speedup": speedup, "results": results, "left_out": self.left_out}

    def trials(self, shape: Shape) -> tuple[Callable[[Entry], Trial], Exact, str]:
        """What runs a case with an entry, the exact results, and the case in words."""
        draw = draw_from(0, DTYPES[shape.case.dtype], self.device)
        inputs = shape.case.make(draw)
        exact = exact_results(shape.case, inputs, draw)
        if exact.grad is not None:
            inputs = {name: t.requires_grad_() for name, t in inputs.items()}
        case = shape.case.describe()
        return lambda entry: Trial(shape.function(self.device, entry), inputs, exact.grad), exact, case

    def serves(self, trials: tuple[Callable[[Entry], Trial], Exact, str], entry: Entry) -> bool:
        """Whether an entry launches, without many spills, with right results; else it is noted.

        Raises:
            UserError: the GPU cannot go on after this launch.
        """
        from triton.runtime.errors import OutOfResources

        trial, exact, case = trials
        launched: list[Any] = []

        def note(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            try:
                launched.append(launch(*args, **kwargs))
            except OutOfResources as error:  # with a stage less it is another entry
                raise RuntimeError(str(error)) from error
            return launched[-1]

        reason = None
        try:
            with self.in_force(entry), launches_through(note), poisoned():
                results = trial(entry).results()
                synchronize(self.device)
        except Exception as error:  # whatever the compiler or the driver raises, the others are still measured
            reason = reason_of(error)
            try:
                synchronize(self.device)
            except RuntimeError as broken:
                raise UserError(
                    f"{self.kernel.name} with {describe(entry)} left the GPU unusable ({reason_of(broken)}); what was "
                    f"found before is saved; leave this candidate out of neighbours() in {MODULE}"
                ) from broken
        else:
            compiled = [kernel for kernel in launched if hasattr(kernel, "asm")]  # not where it is interpreted
            if entry != self.present and self.kernel.name != BACKEND and any(map(executed_spills, compiled)):
                reason = "it spills registers in an inner loop"
            reason = reason or fault(exact.errors(results), self.kernel.tolerance)
        if reason:
            self.left_out.append({"entry": dict(entry), "case": case, "reason": reason})
        return not reason

    @contextlib.contextmanager
    def in_force(self, entry: Entry) -> Iterator[None]:
        """Within, launches take this entry."""
        own: dict[str, Entry | None] = {} if self.kernel.name == BACKEND else {self.kernel.name: entry}
        if own:  # tensors here are aligned: without tensor descriptors only if there is no entry for them
            own[f"{self.kernel.name}_tma"] = None
        with tuning.overriding(**self.others, **own):
            yield

    def time(
        self, trials: tuple[Callable[[Entry], Trial], Exact, str], entries: Mapping[str, Entry], case: Case
    ) -> dict[str, float]:
        """Seconds of the entries that serve a case, by Triton's autotuner: of the most promising
        ones, where the static model has a say.
        """
        import triton
        from triton.runtime.errors import AutotunerError

        trial = trials[0]
        # One alone takes several seconds to compile. What cannot be is told when it is tried.
        launched: dict[str, list[Launched]] = {}

        def compile_alone(launch: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            kernel = launch(*args, **{**kwargs, "warmup": True})
            function = getattr(launch, "__self__", None)
            launched[name].append((getattr(getattr(function, "fn", None), "__name__", ""), kernel, kwargs))
            return kernel

        warm_up = launches_through(compile_alone)
        one_thread = torch.autograd.set_multithreading_enabled(False)  # the mode is that of this thread
        pool = ThreadPoolExecutor(self.jobs)
        with one_thread, pool, triton.AsyncCompileMode(pool, ignore_errors=True), warm_up:
            for name, entry in entries.items():
                launched[name] = []
                with contextlib.suppress(Exception), self.in_force(entry):
                    trial(entry).results()
        promising = by_predicted_time(self.kernel.name, launched, case)
        kept = {describe(self.present), *promising[: self.best]} if promising else set(entries)
        ranks = {name: i + 1 for i, name in enumerate(promising)}
        for name in entries.keys() - kept:
            reason = f"predicted rank {ranks[name]} of {len(ranks)}" if name in ranks else "it does not compile"
            self.left_out.append({"entry": dict(entries[name]), "case": case.describe(), "reason": reason})
        entries = {name: entry for name, entry in entries.items() if name in kept}

        works = {name: trial(entry).works()[self.kernel.direction] for name, entry in entries.items()}
        given = next(iter(works.values())).prepare() if works else None  # the same with all entries

        class Pass:
            """What the autotuner takes for a kernel: the whole pass, with an entry in force."""

            arg_names = ("name",)

            @staticmethod
            def fn() -> None:
                """The autotuner wants a function's name."""

            @staticmethod
            def run(name: str, **_: object) -> None:
                with self.in_force(entries[name]):
                    works[name].call(given)

        def prune(found: Sequence[Any], _: object) -> list[Any]:
            return [config for config in found if self.serves(trials, entries[config.kwargs["name"]])]

        def clock(function: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
            return [1e3 * seconds for seconds in cpu_clock(function, 0)] * len(quantiles)

        # On a GPU its clock is its own, triton.testing.do_bench.
        do_bench = None if self.device.type == "cuda" else clock
        configs = [triton.Config({"name": name}) for name in entries]
        configs *= 2 if len(configs) == 1 else 1  # it does not time a single one
        tuner = triton.autotune(configs, [], prune_configs_by={"early_config_prune": prune}, do_bench=do_bench)(Pass)
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


class LaunchTable:
    """What launches take on a GPU: the table at ``path``, else the one shipped for it."""

    def __init__(self, path: Path, shipped: Path, gpu: str):
        found = next((p for p in (path, shipped) if p.exists()), None)
        old = json.loads(found.read_text(encoding="utf-8")) if found else {"kernels": {}}
        self.path, self.kernels = path, old["kernels"]
        self.sources = {name: old.get("sources", {}).get(name, old["source"]) for name in self.kernels}
        # Without its memory: "NVIDIA H100" serves all of them.
        self.gpu = old.get("gpu", re.sub(r"[ -]+(\d+GB|HBM\d\w*)\b.*", "", gpu))
        backend = [{"up_to": None, "backend": "triton"}]  # what "auto" takes where no table says
        self.present = {BACKEND: backend, **tuning.merged_table(gpu), **self.kernels}

    def entry(self, kernel: str, size: int | None) -> Entry:
        """The entry that serves a size, without its bound; None is beyond every bound."""
        present = self.present[kernel]
        found = next(e for e in present if e["up_to"] is None or (size is not None and size <= e["up_to"]))
        return {name: value for name, value in found.items() if name != "up_to"}

    def choose(self, kernel: Kernel, up_to: int | None, chosen: Entry, source: str) -> None:
        """Replace a class's entry and write the table, an entry a line; the others stay."""
        entries = {bound: self.entry(kernel.name, bound) for bound in kernel.classes} | {up_to: chosen}
        self.present[kernel.name] = [{"up_to": bound, **entry} for bound, entry in entries.items()]
        self.kernels[kernel.name], self.sources[kernel.name] = self.present[kernel.name], source
        parts = [
            f"    {json.dumps(name)}: [\n" + ",\n".join(f"      {json.dumps(e)}" for e in entries) + "\n    ]"
            for name, entries in self.kernels.items()
        ]
        others = {name: old for name, old in self.sources.items() if old != source}
        head = json.dumps({"gpu": self.gpu, "source": source, "sources": others}, indent=2).removesuffix("\n}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            file.write(head + ',\n  "kernels": {\n' + ",\n".join(parts) + "\n  }\n}\n")


def run(arguments: argparse.Namespace, kernels: Sequence[Kernel], device: torch.device, console: Console) -> int:
    """Tune the kernels, or with --dry-run print what would be tried.

    Returns:
        The exit status: 1 if a class has no candidate that passed, or if it was stopped before the
        end.
    """
    slug = cli.device_slug(device)
    path = arguments.output or TABLES / f"{slug}.json"
    env = cli.introduce(MODULE, device, PACKAGES, console)
    table = LaunchTable(path, TABLES / f"{slug}.json", env["device"])
    log_path = path.with_name(f"{path.stem}_log.json") if arguments.output else report.RESULTS / slug / "tune.json"
    source = f"measured on {env['device']}: python -m {MODULE}, {report.describe(env)}"
    content: dict[str, Any] = {"benchmark": "tune", "format": 2, "environment": env, "outcomes": [], "not_reached": []}
    deadline = math.inf if arguments.limit is None else time.monotonic() + arguments.limit
    used = [kernel for kernel in kernels if table.present[kernel.name] is not None]
    todo = [(kernel, up_to) for kernel in used for up_to in kernel.classes]
    chosen: dict[str, dict[int | None, Entry]] = {}
    stopped = True
    with contextlib.suppress(KeyboardInterrupt), cli.terminate_as_interrupt():
        while todo and time.monotonic() < deadline:
            kernel, up_to = todo[0]
            timed, also = kernel.classes[up_to]
            present = table.entry(kernel.name, up_to)
            tried = "".join(f"\n  {describe(entry)}" for entry in candidates(kernel.name, present))
            text = f"{kernel.name}, up to {up_to or 'any'} bytes, {timed[0].case.describe()} and the like"
            console.print(f"{text}{tried} (the first is in force)" if arguments.dry_run else text, soft_wrap=True)
            if not arguments.dry_run:
                # Backends compete with the entries that were just chosen.
                others = {n: of[up_to] for n, of in chosen.items() if kernel.name == BACKEND and up_to in of}
                outcome = Tuner(kernel, device, present, others, arguments.jobs, arguments.best).tune(timed, also)
                content["outcomes"].append({"kernel": kernel.name, "up_to": up_to, **outcome})
                for o in outcome["left_out"]:
                    console.print(f"  left out: {describe(o['entry'])} at {o['case']}: {o['reason']}", soft_wrap=True)
                if outcome["chosen"]:
                    chosen.setdefault(kernel.name, {})[up_to] = outcome["chosen"]
                    table.choose(kernel, up_to, outcome["chosen"], source)
                speedup = f", {outcome['speedup']:.2f} times as fast as before" if outcome["speedup"] else ""
                console.print(f"  {describe(outcome['chosen'] or {}) or 'none passed: as before'}{speedup}")
                report.write_json(log_path, content)
            todo.pop(0)
        stopped = False
    if arguments.dry_run:
        return 0
    content["not_reached"] = [{"kernel": kernel.name, "up_to": up_to} for kernel, up_to in todo]
    report.write_json(log_path, content)
    for kernel, up_to in todo:
        console.print(f"not reached, as before: {kernel.name}, up to {up_to or 'any'} bytes", style="yellow")
    console.print(f"{f'table: {path}; ' if chosen else ''}figures: {log_path}", soft_wrap=True)
    return int(stopped or any(not o["chosen"] for o in content["outcomes"]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.parser(MODULE, __doc__)
    add = made.add_argument
    add("--kernels", nargs="+", choices=list(all_kernels()), help="default: all")
    add("--limit", type=float, help="seconds after which nothing new is begun; default none")
    jobs = max(1, min(12, (os.cpu_count() or 1) - 1))
    add("--jobs", type=int, default=jobs, help="compilations side by side; default %(default)s")
    add("--best", type=int, default=6, help="candidates to time where a model ranks them; default %(default)s")
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
