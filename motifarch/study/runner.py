"""Runs a study's runs, each in processes of its own: side by side, resumable one by one, and none
stops the others.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import yaml

from motifarch.errors import UserError
from motifarch.study.grid import Grid
from motifarch.study.measure import MeasureOptions
from motifarch.study.progress import StudyProgress
from motifarch.study.results import run_result
from motifarch.study.runs import MEASURED, RECIPE, Run, run_recipe
from motifarch.train.manifest import damage, list_checkpoints, step_of
from motifarch.train.read_recipe import to_dict

Stage = Literal["train", "measure"]
_STOPPED = {128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM}
# As a script, which does not import the package around it and torch with it.
_TIED = Path(__file__).with_name("tied.py")
_POLL_S = 0.2
_PATIENCE_S = 120.0
_TAIL = 40


@dataclass(frozen=True)
class Places:
    """Where runs can be."""

    devices: list[str]
    """GPUs as CUDA_VISIBLE_DEVICES names them; empty on a CPU."""

    jobs: int
    """Runs side by side, at most."""

    threads: int
    """CPU threads of each process."""


@dataclass
class _Active:
    """A run at work."""

    run: Run
    devices: list[str]
    stage: Stage
    process: subprocess.Popen[bytes]
    log: IO[bytes]


class Runner:
    """Starts and watches processes; what is known of a run is in its folder."""

    def __init__(
        self,
        grid: Grid,
        places: Places,
        *,
        compute: Literal["auto", "float32", "bfloat16"],
        lock: int,
        progress: StudyProgress,
        stopped: Callable[[], bool],
        after: Callable[[], object],
    ) -> None:
        """Takes what holds for all runs.

        Args:
            grid: the study.
            places: where runs can be.
            compute: the precision of all runs.
            lock: the study folder's lock, which the processes inherit.
            progress: told how runs go.
            stopped: whether the study is to stop.
            after: called after every run that ended, well or not.
        """
        self.grid, self.places, self.compute = grid, places, compute
        self._lock, self._progress, self._stopped, self._after = lock, progress, stopped, after
        self._free = list(places.devices)
        self._active: list[_Active] = []

    def run(self, runs: Sequence[Run]) -> None:
        """Runs those that are given, until all have ended or the study is to stop: then they
        save.
        """
        waiting = deque(runs)
        try:
            while (waiting or self._active) and not self._stopped():
                while waiting and len(self._active) < self.places.jobs and self._fits(waiting[0]):
                    self._begin(waiting.popleft())
                time.sleep(_POLL_S)
                for active in list(self._active):
                    self._progress.show(active.run, active.stage)
                    if (status := active.process.poll()) is not None:
                        self._ended(active, status)
        finally:
            self._stop_all()

    def _fits(self, run: Run) -> bool:
        return not self.places.devices or len(self._free) >= run.matched.size.ranks

    def _begin(self, run: Run) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        recipe = json.loads(json.dumps(to_dict(run_recipe(self.grid, run, self.compute))))
        (run.folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        count = run.matched.size.ranks if self.places.devices else 0
        devices, self._free = self._free[:count], self._free[count:]
        stage: Stage = "measure" if _is_trained(run) and not run.sweep else "train"
        self._active.append(_Active(run, devices, stage, *self._start(run, stage, devices)))

    def _start(self, run: Run, stage: Stage, devices: list[str]) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
        threads = str(self.places.threads)
        env = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(devices if stage == "train" else devices[:1])
        log = (run.folder / f"{stage}.log").open("ab")
        process = subprocess.Popen(
            [sys.executable, "-P", str(_TIED), str(os.getpid()), *self._command(run, stage)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=(self._lock,),
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )
        return process, log

    def _command(self, run: Run, stage: Stage) -> list[str]:
        python, ranks = sys.executable, run.matched.size.ranks
        if stage == "measure":
            device = "cuda" if self.places.devices else "cpu"
            output = str(run.folder / MEASURED)
            command = [python, "-m", "motifarch.study.measure", str(run.folder), "--output", output]
            return [*command, "--seed", str(run.seed), "--device", device, *_options(self.grid.measure)]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return [python, *torchrun, "-m", "motifarch.train", str(run.folder / RECIPE)]

    def _ended(self, active: _Active, status: int) -> None:
        """Goes on to the next stage, or notes how the run ended."""
        active.log.close()
        run = active.run
        if status == 0 and active.stage == "train" and not run.sweep:
            active.stage = "measure"
            active.process, active.log = self._start(run, active.stage, active.devices)
            return
        self._active.remove(active)
        self._free += active.devices
        self._progress.end(run, self._conclude(active, status))
        self._after()

    def _conclude(self, active: _Active, status: int) -> str:
        run, stage = active.run, active.stage
        if status in _STOPPED:
            return "stopped from outside; the same command resumes it"
        tail = _tail(run.folder / f"{stage}.log")
        error = _reason(tail, status) if status else None
        if error is None:
            try:
                result = run_result(run, self.grid.recipe.batch.size * self.grid.data.seq_len)
                run.finish(result)
                return f"finished, validation loss {result['validation_loss']:.4f}"
            except UserError as problem:
                error = str(problem)
        run.fail(stage, error, status, tail)
        return f"failed ({stage}): {error}"

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
            active.log.close()
        self._active.clear()


def _options(measured: MeasureOptions) -> list[str]:
    """The measuring command's options; what is null or empty it decides itself."""
    argv = []
    for name, value in dataclasses.asdict(measured).items():
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        argv += [f"--{name.replace('_', '-')}", *map(str, values)] if values else []
    return argv


def _is_trained(run: Run) -> bool:
    """Whether a complete checkpoint of its last step is there."""
    newest = next(iter(list_checkpoints(run.folder)), None)
    return newest is not None and step_of(newest) == run.steps and damage(newest, hashes=False) is None


def _tail(log: Path) -> list[str]:
    return [line.rstrip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]]


def _reason(tail: Sequence[str], status: int) -> str:
    """What a process says of its end: its own error line, an exception's last line, or what the
    status means.
    """
    if status == -signal.SIGKILL:
        return "killed (signal 9), which mostly means that memory ran out"
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    for pattern in (r"error: .*", r"[\w.]*(Error|Exception|Interrupt)\b.*"):
        for line in reversed(tail):
            if re.match(pattern, line):
                return line.removeprefix("error: ")
    return f"exit status {status}" + (f": {tail[-1]}" if tail else "")
