"""A study from its folder to its report: the sweep, then the runs compared, then results.json."""

import argparse
import contextlib
import fcntl
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from motifarch.data import DataShape
from motifarch.errors import UserError
from motifarch.locks import open_lock_file
from motifarch.study.compare import compare_studies
from motifarch.study.grid import Grid
from motifarch.study.launch import Launcher, LocalLauncher
from motifarch.study.matching import Matched
from motifarch.study.plan import RESULTS, StudyPlan
from motifarch.study.pool import Pool, Slots, find_slots
from motifarch.study.report import write_report
from motifarch.study.runs import FAILED
from motifarch.train.stop import StopSignals

_MOST_JOBS = 100
"""In a cluster's queue at once, unless --jobs says otherwise."""


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
