"""A study from its folder to its results: the sweep first, then the runs that are compared, then
the joined figures.
"""

import argparse
import math
import os
import signal
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from motifarch.environment import environment
from motifarch.errors import UserError
from motifarch.study.comparison import compare, show
from motifarch.study.folder import RESULTS, StudyFolder, locked
from motifarch.study.grid import Grid
from motifarch.study.learning_rates import given_rates, smallest_size, swept_rates
from motifarch.study.matching import Matched
from motifarch.study.progress import StudyProgress
from motifarch.study.report import write_report
from motifarch.study.results import join
from motifarch.study.runner import Places, Runner
from motifarch.study.runs import FAILED, Run, main_run, sweep_run
from motifarch.train.precision import choose_compute
from motifarch.train.stop import StopSignals

_PACKAGES = ("motifarch", "torch", "triton", "transformers", "tokenizers", "datasets", "numpy")


def conduct(
    grid: Grid,
    matched: Sequence[Matched],
    options: argparse.Namespace,
    *,
    command: str,
    fingerprint: str,
    console: Console,
) -> int:
    """Does what is still to be done of a study.

    Args:
        grid: the study.
        matched: its variants at all sizes.
        options: of the command line: output, jobs, threads, retry_failed, and compare: earlier
            results, or None.
        command: the command line, for the record.
        fingerprint: of the prepared data.
        console: where to print.

    Returns:
        The exit status: 0 if all is finished, 1 if a run failed, 128 plus the signal's number if
        one stopped it.

    Raises:
        UserError: the folder belongs to something else, or the machine has too few GPUs.
    """
    places = find_places(grid, options.jobs, options.threads)
    with locked(options.output, console.print) as lock, StopSignals() as signals:
        study = Study(StudyFolder(options.output, grid), grid, matched)
        study.begin(command, fingerprint, places)
        if options.retry_failed:
            study.retry_failed()
        progress = StudyProgress(console, [*study.sweep, *study.runs])
        runner = Runner(
            grid,
            places,
            compute=study.folder.content["compute"],
            lock=lock,
            progress=progress,
            stopped=lambda: bool(signals.received),
            after=study.join,
        )
        try:
            runner.run(study.open_sweep())
            if not signals.received:
                study.choose_rates()
                runner.run([run for run in study.runs if run.status == "missing"])
        finally:
            progress.close()
        return _finish(study, signals.received, console, options.compare)


class Study:
    """All runs of a study and what was decided for them."""

    def __init__(self, folder: StudyFolder, grid: Grid, matched: Sequence[Matched]) -> None:
        """Takes a folder that is this grid's."""
        self.folder, self.grid, self.matched = folder, grid, matched

    @property
    def rates(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Learning rates as far as they are chosen, by size and variant."""
        return self.folder.content.get("learning_rates", {})  # type: ignore[no-any-return]

    @cached_property
    def sweep(self) -> list[Run]:
        """The runs that try learning rates, of each variant at the smallest size."""
        smallest = smallest_size(self.matched)
        variants = [m for m in self.matched if m.size.name == smallest]
        return [sweep_run(self.grid, self.folder.path, m, r) for m in variants for r in self.grid.learning_rate.sweep]

    @property
    def runs(self) -> list[Run]:
        """The runs that are compared; a rate that is not chosen yet is NaN."""
        # By seeds, so that a study that is cut short has compared all variants on the first ones.
        return [
            main_run(self.grid, self.folder.path, m, seed, self._rate(m))
            for seed in self.grid.seeds
            for m in self.matched
        ]

    def _rate(self, matched: Matched) -> float:
        return float(self.rates.get(matched.size.name, {}).get(matched.name, {}).get("learning_rate", math.nan))

    def begin(self, command: str, fingerprint: str, places: Places) -> None:
        """Writes down what the study runs on, and checks that it is what it began with.

        Raises:
            UserError: the data are others.
        """
        device = torch.device("cuda" if places.devices else "cpu")
        data = self.folder.decide("data", lambda: {"path": self.grid.data.path, "fingerprint": fingerprint})
        if data["fingerprint"] != fingerprint:
            raise UserError(
                f"{self.grid.data.path} holds other data (fingerprint {fingerprint[:12]}) than the study in "
                f"{self.folder.path} was begun with ({data['fingerprint'][:12]}); give that data, or another --output"
            )
        self.folder.decide("reference", lambda: self.grid.reference_variant.name)
        asked = self.grid.recipe.precision.compute
        # Once for all runs: on a CPU speed decides it, and two runs might measure differently.
        self.folder.decide("compute", lambda: choose_compute(device) if asked == "auto" else asked)
        start = environment(command, device, _PACKAGES)
        start |= {"threads": places.threads, "jobs": places.jobs, "devices": places.devices}
        self.folder.note("starts", [*self.folder.content.get("starts", []), start])
        if not self.sweep:
            self.folder.decide("learning_rates", lambda: given_rates(self.grid, self.matched))

    def retry_failed(self) -> None:
        """Lets failed runs be tried again, but for those of a sweep that has been decided."""
        for run in [*self.open_sweep(failed=True), *self.runs]:
            run.forget_failure()

    def open_sweep(self, *, failed: bool = False) -> list[Run]:
        """Runs of the sweep that are not done, of variants without a rate; those that failed if
        asked for.
        """
        status = "failed" if failed else "missing"
        known = self.rates.get(smallest_size(self.matched), {})
        return [run for run in self.sweep if run.matched.name not in known and run.status == status]

    def choose_rates(self) -> None:
        """Keeps what was chosen before, adds the best of the sweep, and gives up variants that have
        none.
        """
        if not self.sweep:
            return
        swept = swept_rates(self.grid, self.matched, self.sweep)
        self.folder.note("learning_rates", {size: new | self.rates.get(size, {}) for size, new in swept.items()})
        for run in self.runs:
            if math.isnan(run.learning_rate) and run.status == "missing":
                run.fail("sweep", "no learning rate of its sweep gave a finished run", 1, [])

    def join(self) -> dict[str, Any]:
        """Writes results.json and returns it."""
        return join(self.folder, self.matched, self.runs, self.sweep)


def find_places(grid: Grid, jobs: int | None, threads: int | None) -> Places:
    """Where runs can be on this machine: each on GPUs of its own, or on a CPU.

    Args:
        grid: the study.
        jobs: runs side by side; None for as many as have GPUs, or one on a CPU.
        threads: CPU threads of each process; None shares the cores among the jobs.

    Raises:
        UserError: a run takes more GPUs than there are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices: list[str] = []
    if torch.cuda.is_available():
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
        ranks = [size.ranks for size in grid.sizes]
        if max(ranks) > len(devices):
            raise UserError(f"sizes.ranks is {max(ranks)}, but there are {len(devices)} GPUs; lower it, or add GPUs")
        jobs = jobs or len(devices) // min(ranks)
    jobs = jobs or 1
    return Places(devices, jobs, threads or max(1, cores // jobs))


def _finish(study: Study, stopped: int, console: Console, earlier: dict[str, Any] | None) -> int:
    """Writes the report and says what came out; the exit status."""
    results, output = study.join(), study.folder.path
    if any(run.status == "finished" for run in study.runs):
        if earlier is not None:
            results["comparison"] = compare(results, earlier)
            show(results["comparison"], console)
        write_report(results, output)
        console.print(Text(f"written: {output / RESULTS}, report.html, report.md"), soft_wrap=True)
    left = [run for run in study.runs if run.status != "finished"]
    if stopped:
        name = signal.Signals(stopped).name
        console.print(f"stopped by {name}; runs still to be finished: {len(left)}. The same command goes on")
        return 128 + stopped
    for run in left:
        error = run.read(FAILED)["error"] if run.status == "failed" else "stopped from outside"
        console.print(Text(f"{run.label}: {run.status}: {error}"), soft_wrap=True)
    if left:
        console.print(f"{len(left)} of {len(study.runs)} runs are not finished; --retry-failed tries failed ones again")
    return 1 if left else 0
