"""A study's processes as jobs of a cluster, by submitit: SLURM, or processes of this machine as it
would start them.

Jobs outlive the process that submitted them. Each leaves its id beside its log, and a study that is
started again takes them up where it left them. What SLURM preempts, or whose time is up, saves and
is queued again.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from motifarch.errors import UserError, first_line
from motifarch.study.launch import with_parent

try:
    import submitit
except ImportError:
    raise UserError("--submitit needs submitit, which is not installed: pip install 'motifarch[slurm]'") from None

T = TypeVar("T")
_STOPPED = 143  # as of SIGTERM: the job is gone without a result
_OFTEN = 1000
_POLL_S = 5.0
_LAG_S = 20.0
"""How long a shared file system may take to show what a job has written."""


class Command:
    """A command with its log, as a job: its result is the exit status."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.command, self.log, self.environment = list(command), log, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Runs it."""
        with self.log.open("ab") as file:
            self._process = subprocess.Popen(
                with_parent(self.command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment,
            )
            return self._process.wait()

    def checkpoint(self) -> Any:
        """Lets it save, for the job is to end here and be queued again (submitit calls this)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended
                os.kill(self._process.pid, signal.SIGTERM)
                # Popen.wait would wait for ever: this interrupts it, and it holds a lock.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(Command(self.command, self.log, self.environment))


class JobProcess:
    """A job, asked as a process is.

    Args:
        job: submitit's.
        note: the file that holds its id, removed once it has ended.
    """

    def __init__(self, job: Any, note: Path) -> None:
        self._job, self._note = job, note
        self._asked = self._gone = 0.0

    def poll(self) -> int | None:
        """Its exit status; None while it waits or runs."""
        if not self._job.paths.result_pickle.exists():
            # The queue is asked seldom, and the result may show later than the job's end.
            now = time.monotonic()
            if now - self._asked > _POLL_S:
                self._asked = now
                self._gone = 0.0 if _is_queued(self._job) else self._gone or now
            if not self._gone or now - self._gone < _LAG_S:
                return None
        self._note.unlink(missing_ok=True)
        if not self._job.paths.result_pickle.exists():
            return _STOPPED
        try:
            return int(self._job.result())
        except submitit.core.utils.FailedJobError:
            return 1

    def terminate(self) -> None:
        """Cancels it: it saves, and ends."""
        self._job.cancel(check=False)

    kill = terminate

    def wait(self, timeout: float | None = None) -> int:
        """As a process does."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"job {self._job.job_id}", timeout or 0.0)
            time.sleep(0.2)
        return status


def _is_queued(job: Any) -> bool:
    """Whether a job waits or runs. SLURM's queue is asked, for its accounting may be off."""
    if not isinstance(job, submitit.SlurmJob):
        return not job.done(force_check=True)
    asked = subprocess.run(["squeue", "--noheader", "--jobs", job.job_id], capture_output=True, text=True, check=False)
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


def _submit(executor: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return executor.submit(function, *arguments)
    except (submitit.core.utils.FailedJobError, OSError) as error:
        raise UserError(f"the cluster takes no job: {' '.join(str(error).split())}; see --submitit") from None


class JobLauncher:
    """Submits jobs.

    Args:
        folder: submitit's own files.
        options: of `submitit.AutoExecutor.update_parameters`, and `cluster`: slurm, local, or null
            for SLURM where it is installed. `gpus_per_node` is what a run of one rank takes: 1
            unless it says 0.

    Raises:
        UserError: options that submitit does not know, or no SLURM.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._folder, self._options = folder, dict(options)
        self._cluster = self._options.pop("cluster", None)
        self.gpus = int(self._options.pop("gpus_per_node", 1))
        self._executor(1)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str], ranks: int) -> JobProcess:
        """As the protocol says. A job that an earlier start left for this log is taken up."""
        note = log.with_suffix(".job")
        for stale in set(log.parent.glob("*.job")) - {note}:  # of an earlier stage, which is through
            stale.unlink()
        executor = self._executor(ranks)
        if note.exists():
            return JobProcess(executor.job_class(folder=self._folder, job_id=note.read_text().strip()), note)
        job = _submit(executor, Command(command, log.resolve(), environment))
        note.write_text(job.job_id, encoding="utf-8")
        return JobProcess(job, note)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """As the protocol says: in a job, which is waited for."""
        return _submit(self._executor(1), function, *arguments).result()  # type: ignore[no-any-return]

    def _executor(self, ranks: int) -> Any:
        try:
            # A run may be cut by the time limit as often as it takes: each time it has got on.
            made = submitit.AutoExecutor(folder=self._folder, cluster=self._cluster, slurm_max_num_timeout=_OFTEN)
            gpus = {"gpus_per_node": self.gpus * ranks} if self.gpus else {}
            made.update_parameters(name="motifarch", tasks_per_node=1, **gpus)
            made.update_parameters(**self._options)
        except (ValueError, TypeError, NameError, RuntimeError, AssertionError) as error:
            raise UserError(
                f"--submitit is {self._options | {'cluster': self._cluster}}: {first_line(error)}; give parameters of "
                "submitit's AutoExecutor, such as '{slurm_partition: gpu, timeout_min: 240}'"
            ) from None
        return made._executor  # what knows its class of jobs
