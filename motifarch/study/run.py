"""A study from its folder to its report: the sweep, then the runs compared, then results.json."""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import chain, product
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.text import Text

from motifarch.data import DataShape
from motifarch.environment import environment
from motifarch.errors import UserError
from motifarch.files import write_json
from motifarch.locks import open_lock_file
from motifarch.study.analysis import FORMAT, KIND
from motifarch.study.compare import compare_studies
from motifarch.study.grid import GRIDS, Grid, SizeSpec
from motifarch.study.launch import Launcher, LocalLauncher
from motifarch.study.matching import TOLERANCE, Matched
from motifarch.study.pool import Pool, Slots, find_slots
from motifarch.study.report import write_report
from motifarch.study.runs import FAILED, Run, choose_rates, with_model
from motifarch.study.side_by_side import fastest_attention, step_seconds
from motifarch.train.precision import choose_compute
from motifarch.train.recipe import Recipe
from motifarch.train.stop import StopSignals

STUDY, RESULTS = "study.json", "results.json"
_MOST_JOBS = 100
"""In a cluster's queue at once, unless --jobs says otherwise."""
_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "numpy")


def run_study(
    grid: Grid,
    matched: Sequence[Matched],
    options: argparse.Namespace,
    *,
    command: str,
    fingerprint: str,
    sequences: DataShape,
    console: Console,
) -> int:
    """Does what is still to be done of a study.

    Args:
        grid: the study.
        matched: its variants at all sizes.
        options: of `motifarch.study.main`, compare as earlier results or None.
        command: the command line, for the record.
        fingerprint: of the prepared data.
        sequences: their length and vocabulary.
        console: where to print.

    Returns:
        The exit status: 0 if all is finished, 1 if a run failed, 128 plus the signal's number if
        one stopped it.

    Raises:
        UserError: the folder belongs to something else, or the machine has too few GPUs.
    """
    slots = None if options.submitit else find_slots(grid, options.jobs, options.threads)
    with locked(options.output, console.print) as lock, StopSignals() as signals:
        plan = StudyPlan(options.output, grid, matched)
        launcher: Launcher = LocalLauncher(lock)
        if slots is None:
            launcher, slots = _cluster(options)
        plan.begin(command, fingerprint, sequences, slots, launcher)
        if options.retry_failed:
            for run in [*(run for size in plan.sizes for run in plan.open_sweep(size, "failed")), *plan.runs]:
                (run.folder / FAILED).unlink(missing_ok=True)  # it resumes from its newest checkpoint
        pool = Pool(
            grid,
            slots,
            [*plan.sweep, *plan.runs],
            compute=plan.content["compute"],
            attention=plan.content["softmax_attention"],
            launcher=launcher,
            console=console,
            stopped=lambda: bool(signals.received),
            after=plan.write_results,
        )
        for size in plan.sizes:
            pool.run(plan.open_sweep(size, "missing"))
            if not signals.received:
                plan.choose_rates(size)
                pool.run([run for run in plan.runs if run.matched.size == size and run.status == "missing"])
        if not signals.received:
            plan.time_steps(sequences, slots, launcher)
        return _finish(plan, signals.received, console, options.compare)


def _cluster(options: argparse.Namespace) -> tuple[Launcher, Slots]:
    """What submits jobs, and how many there may be at once."""
    from motifarch.study.cluster import JobLauncher  # submitit is not installed with the package

    launcher = JobLauncher(options.output / "jobs", options.submitit)
    return launcher, Slots([], options.jobs or _MOST_JOBS, options.threads or 1, "cuda" if launcher.gpus else "cpu")


@contextlib.contextmanager
def locked(folder: Path, say: Callable[[str], None], patience_s: float = 60.0) -> Iterator[int]:
    """Keeps other studies out of a folder.

    The lock is passed on to the runs' processes (flock's outlive the process that took them), so
    that those of a study that was killed are waited for: they end by themselves.

    Args:
        folder: the study's, made if need be.
        say: told that others are waited for.
        patience_s: how long, in seconds.

    Yields:
        The lock's file descriptor, for the processes to inherit.

    Raises:
        UserError: another study is at work there, or the folder can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output is {folder}, which can't be written: {error.strerror}; give another one") from None
    with os.fdopen(open_lock_file(folder / ".lock"), "w") as file:
        if not _try_lock(file):
            say(f"waiting for the processes that are still at work in {folder}")
            deadline = time.monotonic() + patience_s
            while not _try_lock(file):
                if time.monotonic() > deadline:
                    raise UserError(
                        f"another process is at work in {folder}; wait until it ends, or give another --output"
                    )
                time.sleep(0.2)
        yield file.fileno()


def _try_lock(file: TextIO) -> bool:
    with contextlib.suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


class StudyPlan:
    """All runs of a study, and `study.json`: its grid and what was decided once for all runs."""

    def __init__(self, path: Path, grid: Grid, matched: Sequence[Matched]) -> None:
        """Opens the folder for a grid.

        Raises:
            UserError: it belongs to another grid.
        """
        self.path, self.grid, self.matched = path, grid, matched
        own = _as_json(grid)
        self.content: dict[str, Any] = {"kind": KIND, "format": FORMAT, "grid": own}
        try:
            self.content = json.loads((path / STUDY).read_text(encoding="utf-8"))
            # Fields that there were not then have their defaults.
            before = _as_json(GRIDS.parse(self.content["grid"]))
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, UserError):
            raise UserError(f"{path / STUDY} is damaged; give another --output, or delete that folder") from None
        if changed := list(_differences(before, own)):
            shown = "; ".join(f"{name} is {now!r}, was {was!r}" for name, was, now in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                f"{path} holds a study of another grid: {shown}{more}. Give this one an --output of its own, or the "
                "former grid again"
            )

    @cached_property
    def sizes(self) -> list[SizeSpec]:
        """The one with the fewest parameters first: larger ones may take its learning rates."""
        least = {m.size.name: m.costs["parameters"] for m in reversed(self.matched)}
        return sorted(self.grid.sizes, key=lambda size: least[size.name])

    @cached_property
    def sweep(self) -> list[Run]:
        """The runs that try learning rates, of each variant at the smallest size or at all."""
        grid, smallest = self.grid, self.sizes[0]
        everywhere = grid.learning_rate.transfer == "sweep"
        runs = []
        for m, rate in product((m for m in self.matched if everywhere or m.size == smallest), grid.learning_rate.sweep):
            steps = grid.steps(m.size, grid.learning_rate.tokens or max(1, (m.size.tokens or grid.tokens) // 4))
            of_size = self.path / "sweep" / (m.size.name if everywhere else "")
            folder = of_size / m.variant.folder / f"lr_{rate:g}"
            runs.append(Run(m, grid.seeds[0], steps, rate, folder, sweep=True))
        return runs

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared; a rate that is not chosen yet is NaN."""
        runs = []
        # By seeds, so that a study that is cut short has compared all variants on the first ones.
        by_size = ((m for m in self.matched if m.size == size) for size in self.sizes)
        for seed, m in chain.from_iterable(product(self.grid.seeds, found) for found in by_size):
            folder = self.path / "runs" / m.size.name / m.variant.folder / f"seed_{seed}"
            rate = float(self._rate(m).get("learning_rate", math.nan))
            runs.append(Run(m, seed, self.grid.steps(m.size), rate, folder))
        return runs

    def _rate(self, matched: Matched) -> dict[str, Any]:
        rates = self.content.get("learning_rates", {})
        return rates.get(matched.size.name, {}).get(matched.name, {})  # type: ignore[no-any-return]

    def note(self, name: str, value: Any) -> None:
        """Writes a value under a name of study.json."""
        self.content[name] = value
        write_json(self.path / STUDY, self.content)

    def begin(self, command: str, fingerprint: str, sequences: DataShape, slots: Slots, launcher: Launcher) -> None:
        """Writes down what the study runs on; what was decided at an earlier start stays.

        Raises:
            UserError: the data are not those that it was begun with.
        """
        device = torch.device(slots.device)
        asked = self.grid.recipe.precision.compute
        decided: dict[str, Callable[[], Any]] = {
            "data": lambda: {"path": self.grid.data.path, "fingerprint": fingerprint},
            "reference": lambda: self.grid.reference_variant.name,
            # Once for all runs: on a CPU speed decides it, and two runs might measure differently.
            "compute": lambda: launcher.call(choose_compute, device) if asked == "auto" else asked,
        }
        # After the precision, in which they are timed.
        decided["softmax_attention"] = lambda: self._time_softmax(sequences, slots, launcher)
        if not self.sweep:
            decided["learning_rates"] = lambda: choose_rates(self.grid, self.matched, self.sizes[0])
        for name, decide in decided.items():
            if name not in self.content:
                self.note(name, decide())
        if (data := self.content["data"])["fingerprint"] != fingerprint:
            raise UserError(
                f"{self.grid.data.path} holds other data (fingerprint {fingerprint[:12]}) than the study in "
                f"{self.path} was begun with ({data['fingerprint'][:12]}); give that data, or another --output"
            )
        start = launcher.call(environment, command, device, _PACKAGES) | dataclasses.asdict(slots)
        self.note("starts", [*self.content.get("starts", []), start])

    def _time_softmax(self, sequences: DataShape, slots: Slots, launcher: Launcher) -> dict[str, str]:
        """The fastest attention of each size's first softmax variant."""
        found = {}
        for m in reversed(self.matched):
            if m.variant.is_softmax and self.grid.recipe.model.attn_implementation is None:
                how = (sequences, torch.device(slots.device), self.content["compute"], slots.threads)
                found[m.size.name] = launcher.call(fastest_attention, self._recipe(m), *how)
        return found

    def time_steps(self, sequences: DataShape, slots: Slots, launcher: Launcher) -> None:
        """Notes the seconds of a micro-batch of each variant, taken side by side, once; of sizes
        that one process holds.
        """
        found = self.content.get("step_seconds", {})
        for size in self.sizes:
            if size.name not in found and size.ranks == 1:
                recipes = {m.name: self._recipe(m) for m in self.matched if m.size == size}
                how = (sequences, torch.device(slots.device), self.content["compute"], slots.threads)
                found[size.name] = launcher.call(step_seconds, recipes, *how)
                self.note("step_seconds", found)

    def _recipe(self, m: Matched) -> Recipe:
        """What decides how fast a variant trains."""
        attention = self.content.get("softmax_attention", {}).get(m.size.name)
        return with_model(self.grid.recipe, m, attention)

    def open_sweep(self, size: SizeSpec, status: str) -> list[Run]:
        """A size's runs of the sweep with a status, of variants whose rate is not chosen yet."""
        own = (run for run in self.sweep if run.matched.size == size)
        return [run for run in own if not self._rate(run.matched) and run.status == status]

    def choose_rates(self, size: SizeSpec) -> None:
        """Adds the best rates of a size to those chosen, and gives up variants without one."""
        if not self.sweep:
            return
        own = [m for m in self.matched if m.size == size]
        swept = choose_rates(self.grid, own, self.sizes[0], self.sweep).get(size.name, {})
        before = self.content.get("learning_rates", {})
        self.note("learning_rates", before | {size.name: swept | before.get(size.name, {})})
        for run in self.runs:
            if run.matched.size == size and math.isnan(run.learning_rate) and run.status == "missing":
                run.fail("sweep", "no learning rate of its sweep gave a finished run", 1)

    def write_results(self) -> dict[str, Any]:
        """Joins what there is, writes results.json and returns it."""
        content = self.content
        joined = {
            "kind": KIND,
            "format": FORMAT,
            "command": content["starts"][-1]["command"],
            "environment": content["starts"][-1],
            "starts": content["starts"],
            "grid": _as_json(self.grid),
            "matching": {"by": self.grid.match, "tolerance": TOLERANCE, "reference": content["reference"]},
            "data": content["data"],
            "compute": content["compute"],
            "softmax_attention": content["softmax_attention"],
            "step_seconds": content.get("step_seconds", {}),
            "micro_batch_tokens": self.grid.recipe.batch.micro_size * self.grid.data.seq_len,
            "variants": [self._variant(m) for m in self.matched],
            "designs": [
                {"name": design.name, "fixed": design.fixed, "makes_up": design.makes_up}
                | {"variants": [variant.name for variant in design.variants]}
                for design in self.grid.designs
            ],
            "sweep": [run.outcome() for run in self.sweep],
            "runs": [run.outcome() for run in self.runs],
        }
        write_json(self.path / RESULTS, joined)
        return joined

    def _variant(self, matched: Matched) -> dict[str, Any]:
        return {
            "name": matched.name,
            "size": matched.size.name,
            "attention": matched.variant.attention,
            "ratio": matched.variant.head_ratio,
            "activation": matched.variant.activation,
            "model": matched.model,
            "parameters": matched.costs["parameters"],
            "embedding_parameters": matched.embedding_parameters,
            "training_flops_per_token": matched.costs["flops"],
            "kv_bytes_per_token": matched.costs["kv_cache"],
            "deviation": matched.deviations[self.grid.match],
            "deviations": matched.deviations,
            **(self._rate(matched) or {"learning_rate": None, "learning_rate_from": None}),
        }


def _as_json(grid: Grid) -> dict[str, Any]:
    """As JSON has it: tuples are lists there."""
    return json.loads(json.dumps(dataclasses.asdict(grid)))  # type: ignore[no-any-return]


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted name, before, after) of each value that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for i, (was, now) in enumerate(zip(before, after, strict=True)):
            yield from _differences(was, now, f"{prefix}[{i}]")
    elif before != after:
        yield prefix, before, after


def _finish(plan: StudyPlan, stopped: int, console: Console, earlier: dict[str, Any] | None) -> int:
    """Writes the report and says what came out; the exit status."""
    results = plan.write_results()
    if any(run.status == "finished" for run in plan.runs):
        if earlier is not None:
            results["comparison"] = compare_studies(results, earlier)
            rows = results["comparison"]["rows"]
            console.print(f"{sum(row['verdict'] == 'moved' for row in rows)} of {len(rows)} figures moved")
            for row in (row for row in rows if row["verdict"] == "moved"):
                told = f"{row['what']}, {row['measure']}: {row['old']:.5g} to {row['new']:.5g} ({row['change']:+.2%})"
                console.print(Text(f"  {told}, {'better' if row['better'] else 'worse'}"), soft_wrap=True)
        write_report(results, plan.path)
        console.print(Text(f"written: {plan.path / RESULTS}, report.html, report.md"), soft_wrap=True)
    left = [run for run in plan.runs if run.status != "finished"]
    if stopped:
        name = signal.Signals(stopped).name
        console.print(f"stopped by {name}; runs still to be finished: {len(left)}. The same command goes on")
        return 128 + stopped
    for run in left:
        error = run.read(FAILED)["error"] if run.status == "failed" else "stopped from outside"
        console.print(Text(f"{run.label}: {run.status}: {error}"), soft_wrap=True)
    if left:
        console.print(f"{len(left)} of {len(plan.runs)} runs are not finished; --retry-failed tries failed ones again")
    return 1 if left else 0
