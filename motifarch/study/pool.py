"""Runs a study's runs, each in processes of its own: side by side, and none stops the others."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from motifarch.errors import UserError
from motifarch.models.motif.own_attention import TRUSTED
from motifarch.study.grid import Grid
from motifarch.study.launch import Launcher, Process
from motifarch.study.runs import MEASURED, RECIPE, Run, run_recipe, run_result
from motifarch.train.manifest import damage, list_checkpoints, step_of
from motifarch.train.read_recipe import to_dict
from motifarch.train.stop import SIGNALS

_STOPPED = {status for number in SIGNALS for status in (128 + number, -number)}
_POLL_S = 0.2
_PATIENCE_S = 120.0
_TAIL = 40


@dataclass(frozen=True)
class Slots:
    """Where runs can be."""

    devices: list[str]
    """GPUs as CUDA_VISIBLE_DEVICES names them; empty on a CPU, and where a cluster gives them."""

    jobs: int
    """Runs side by side, at most."""

    threads: int
    """CPU threads of each process."""

    device: Literal["cuda", "cpu"] = "cpu"
    """Which runs take."""


def find_slots(grid: Grid, jobs: int | None, threads: int | None) -> Slots:
    """Where runs can be on this machine: each on GPUs of its own, or on the CPU.

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
    return Slots(devices, jobs, threads or max(1, cores // jobs), "cuda" if devices else "cpu")


@dataclass
class _Active:
    """A run at work."""

    run: Run
    devices: list[str]
    stage: Literal["train", "measure"]
    process: Process
    log_begins: int
    """Bytes of its log that earlier tries wrote."""


class Pool:
    """Starts and watches processes; what is known of a run is in its folder.

    Args:
        grid: the study.
        slots: where runs can be.
        runs: all of the study's, whose FLOPs tell the time left.
        compute: the precision of all runs.
        attention: the attn_implementation of softmax attention by size.
        launcher: starts the processes.
        console: where progress is shown.
        stopped: whether the study is to stop.
        after: called after every run that ended, well or not.
    """

    def __init__(
        self,
        grid: Grid,
        slots: Slots,
        runs: Sequence[Run],
        *,
        compute: Literal["auto", "float32", "bfloat16"],
        attention: Mapping[str, str],
        launcher: Launcher,
        console: Console,
        stopped: Callable[[], bool],
        after: Callable[[], object],
    ) -> None:
        self.grid, self.slots, self.compute, self.attention = grid, slots, compute, attention
        self._launcher, self._console, self._stopped, self._after = launcher, console, stopped, after
        self._free, self._runs = list(slots.devices), list(runs)
        self._active: list[_Active] = []
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        # Speed is that since the start: runs differ.
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal, speed_estimate_period=1e9)
        total = sum(run.steps * run.matched.costs["flops"] for run in runs)
        self._bar = self._bars.add_task("the study", total=total, completed=int(self._flops_done()))

    def _flops_done(self) -> float:
        """Of all runs; one that failed is no longer waited for."""
        done = {"finished": lambda r: r.steps, "failed": lambda r: r.steps, "missing": Run.steps_done}
        return sum(done[run.status](run) * run.matched.costs["flops"] for run in self._runs)

    def run(self, runs: Sequence[Run]) -> None:
        """Runs those given, until all have ended or the study is to stop: then they save."""
        waiting = deque(runs)
        try:
            with self._bars:
                while (waiting or self._active) and not self._stopped():
                    while waiting and len(self._active) < self.slots.jobs:
                        if len(self._free) < self._gpus(waiting[0]):
                            break
                        self._begin(waiting.popleft())
                    time.sleep(_POLL_S)
                    for active in list(self._active):
                        if (status := active.process.poll()) is not None:
                            self._ended(active, status)
                    if self._console.is_terminal:
                        working = ", ".join(f"{a.run.label} {a.run.steps_done()}/{a.run.steps}" for a in self._active)
                        self._bars.update(self._bar, completed=self._flops_done(), description=working)
        finally:
            self._stop_all()

    def _gpus(self, run: Run) -> int:
        return run.matched.size.ranks if self.slots.devices else 0

    def _begin(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        attention = self.attention.get(run.matched.size.name)
        recipe = to_dict(run_recipe(self.grid, run, self.compute, attention))
        (run.folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        count = self._gpus(run)
        devices, self._free = self._free[:count], self._free[count:]
        stage: Literal["train", "measure"] = "measure" if _is_trained(run) and not run.sweep else "train"
        self._active.append(self._start(run, stage, devices))

    def _start(self, run: Run, stage: Literal["train", "measure"], devices: list[str]) -> _Active:
        threads = str(self.slots.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        if run.matched.variant.is_own:  # the grid's author named it; measuring loads it from a checkpoint
            environment[TRUSTED] = run.matched.variant.attention
        if devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices if stage == "train" else devices[:1])
        ranks = run.matched.size.ranks if stage == "train" else 1
        log = run.folder / f"{stage}.log"
        begins = log.stat().st_size if log.exists() else 0
        process = self._launcher.start(self.command(run, stage), log, environment, ranks)
        return _Active(run, devices, stage, process, begins)

    def command(self, run: Run, stage: str) -> list[str]:
        """The process of a run's stage, "train" or "measure"."""
        python, ranks = sys.executable, run.matched.size.ranks
        if stage == "measure":
            options = {"output": run.folder / MEASURED, "seed": run.seed, "device": self.slots.device}
            command = [python, "-m", "motifarch.study.measure", str(run.folder)]
            for name, value in (options | dataclasses.asdict(self.grid.measure)).items():
                # What is null or empty the measuring decides itself.
                values = value if isinstance(value, list | tuple) else [] if value is None else [value]
                command += [f"--{name.replace('_', '-')}", *map(str, values)] if values else []
            return command
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return [python, *torchrun, "-m", "motifarch.train", str(run.folder / RECIPE)]

    def _ended(self, active: _Active, status: int) -> None:
        """Goes on to the next stage, or notes how the run ended."""
        run = active.run
        self._active.remove(active)
        if status == 0 and active.stage == "train" and not run.sweep:
            self._active.append(self._start(run, "measure", active.devices))
            return
        self._free += active.devices
        outcome = self._conclude(active, status)
        done = sum(other.status != "missing" for other in self._runs)
        self._console.print(Text(f"{run.label}: {outcome}; {done} of {len(self._runs)} runs done"), soft_wrap=True)
        self._after()

    def _conclude(self, active: _Active, status: int) -> str:
        run, stage = active.run, active.stage
        if status in _STOPPED:
            return "stopped from outside; the same command resumes it"
        log = (run.folder / f"{stage}.log").read_bytes()[active.log_begins :].decode(errors="replace")
        tail = [line.rstrip() for line in log.splitlines()[-_TAIL:]]
        try:
            if status:
                raise UserError((status == 1 and _hung(log)) or _reason(tail, status))
            result = run_result(run, self.grid.recipe.batch.size * self.grid.data.seq_len)
        except UserError as error:
            run.fail(stage, str(error), status, tail)
            return f"failed ({stage}): {error}"
        run.finish(result)
        return f"finished, validation loss {result['validation_loss']:.4f}"

    def _stop_all(self) -> None:
        """Asks what is still running to save and end, and waits for it."""
        for active in self._active:
            active.process.terminate()
        deadline = time.monotonic() + _PATIENCE_S
        for active in self._active:
            try:
                active.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                active.process.kill()
                active.process.wait()
        self._active.clear()


def _is_trained(run: Run) -> bool:
    """Whether a complete checkpoint of its last step is there."""
    newest = next(iter(list_checkpoints(run.folder)), None)
    return newest is not None and step_of(newest) == run.steps and damage(newest, hashes=False) is None


def _hung(log: str) -> str | None:
    """What a run's watchdog wrote before the stacks of all threads, if it ended the run."""
    found = re.findall(r"^Timeout \(([\d:]+)[^)]*\)!$", log, re.MULTILINE)
    return f"no step came to its end within {found[-1]}; its log has what all threads were doing" if found else None


def _reason(tail: Sequence[str], status: int) -> str:
    """Why a process ended: its error line, an exception's last one, or what the status means."""
    if status == -signal.SIGKILL:
        return "killed (signal 9), which mostly means that memory ran out"
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    for pattern in (r"error: .*", r"[\w.]*(Error|Exception|Interrupt)\b.*"):
        for line in reversed(tail):
            if re.match(pattern, line):
                return line.removeprefix("error: ")
    return f"exit status {status}" + (f": {tail[-1]}" if tail else "")
