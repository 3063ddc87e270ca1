"""NVIDIA's compute-sanitizer memcheck over small cases of every kernel: no access outside of a
tensor.

    python -m benchmarks.sanitize --output sanitize.json     # on a GPU, with CUDA's compute-sanitizer
    python -m benchmarks.sanitize --quick                    # the same cases without the sanitizer, to prove them
    python -m benchmarks.sanitize --run "GDA 4:1" decode     # cases in this process: what the sanitizer is given

Each family of kernels (kernel_cases.py) has a process of its own, forward and backward. It runs
without the sanitizer first, so that Triton has compiled its kernels to disk, and then under it.
Torch does not keep freed memory (PYTORCH_NO_CUDA_MEMORY_CACHING), so that each tensor is an
allocation whose ends the sanitizer knows. Where a family has errors, each of its cases is run by
itself, to tell which. A kernel that reads past its tensor on purpose shows that the sanitizer sees
such things here: without that error nothing that is clean means anything, and the run has failed.

The exit status is 0 if everything was clean, or if there is no compute-sanitizer, which is said and
written; else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import kernel_cases
from benchmarks.kernels import terminate_as_interrupt
from benchmarks.lib import report
from motifarch.errors import UserError

PACKAGES = ("motifarch", "torch", "triton")
PLANTED = "planted"
"""The case that must have errors."""
ROWS = {"cuda": 150, "cpu": 20}
LIMIT = 300.0
AT_ONCE = 4

_OPTIONS = (
    "--tool=memcheck",
    # Else the byte after a tensor may be the first of another, where nobody minds an access.
    "--padding=4096",
    "--target-processes=application-only",
    # Torch asks the driver for things that it may not have, and goes on without them.
    "--report-api-errors=no",
    "--print-limit=20",
)
_SHOWN_LINES = 12


@dataclass
class Outcome:
    """What became of some cases, in one process or, where that had errors, in one for each."""

    family: str
    cases: list[str]
    seconds: float = 0.0
    errors: int | None = None
    """That the sanitizer counted; None where it told no number, or was not asked."""
    failure: str = ""
    """Why it did not run to its end."""
    report: list[str] = field(default_factory=list)
    """The first lines of what the sanitizer said."""

    @property
    def good(self) -> bool:
        """Whether it is as it should be: no error, or the one that was planted."""
        return bool(self.errors) if self.family == PLANTED else not self.errors and not self.failure


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer: on the PATH, in CUDA_HOME or where CUDA is installed by
    default.
    """
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [os.environ.get("PATH", ""), *(str(Path(home, "bin")) for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def version_of(sanitizer: str) -> str:
    """What ``--version`` says of itself."""
    said = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False, timeout=60).stdout
    found = re.search(r"^Version\s+(.+)$", said, re.MULTILINE)
    return found[1].strip() if found else (said.strip().splitlines() or ["unknown"])[-1]


def options_of(sanitizer: str) -> list[str]:
    """The options that it has, of those wanted: not every version has all."""
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, check=False, timeout=60).stdout
    return [option for option in _OPTIONS if option.partition("=")[0].lstrip("-") in known]


def read_report(outcome: Outcome, output: str, status: int) -> None:
    """Put into an outcome what the sanitizer and the program under it printed.

    Args:
        outcome: of the cases that were run.
        output: all of it; the sanitizer's own lines begin with ``=========``.
        status: the exit status.
    """
    lines = [line for line in output.splitlines() if line.startswith("=========")]
    said = [line.lstrip("= ") for line in lines]
    if summary := re.search(r"^=+ ERROR SUMMARY: (\d+) error", output, re.MULTILINE):
        outcome.errors = int(summary[1])
    outcome.report = [line for line in said if line and line != "COMPUTE-SANITIZER"][:_SHOWN_LINES]
    done = {line.removeprefix("done: ") for line in output.splitlines() if line.startswith("done: ")}
    if outcome.errors:
        return
    missing = [case for case in outcome.cases if case not in done]
    if summary is None:
        outcome.failure = f"the sanitizer ended with exit status {status} and without a summary"
    elif status or missing:
        outcome.failure = f"exit status {status}; not finished: {', '.join(missing) or 'nothing'}"
    if outcome.failure:
        others = [line for line in output.splitlines() if line.strip() and line not in lines]
        outcome.report += others[-_SHOWN_LINES:]


def _end(process: subprocess.Popen[str]) -> None:
    """With what it started: the sanitizer's end is not that of the program under it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Runner:
    """Runs cases in processes of their own, until a time."""

    def __init__(self, sanitizer: Sequence[str], device: str, deadline: float):
        self.sanitizer, self.device, self.deadline = list(sanitizer), device, deadline
        self._processes: set[subprocess.Popen[str]] = set()

    def stop(self) -> None:
        """End what is running, and begin nothing more."""
        self.deadline = 0.0
        for process in list(self._processes):
            _end(process)

    def process(self, cases: Sequence[str], *, sanitized: bool) -> tuple[str, int]:
        """Run cases in a process, under the sanitizer or not.

        Returns:
            What it printed, and its exit status.

        Raises:
            TimeoutError: the time was over before it ended.
        """
        command = [sys.executable, "-m", "benchmarks.sanitize", "--device", self.device, "--run", *cases]
        if sanitized:
            command = [*self.sanitizer, *command]
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        if self.device == "cpu":
            env["TRITON_INTERPRET"] = "1"
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        process = subprocess.Popen(
            command,
            cwd=report.ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._processes.add(process)
        if time.monotonic() >= self.deadline:  # stop() came between
            _end(process)
        try:
            output, _ = process.communicate(timeout=left)
        except subprocess.TimeoutExpired:
            _end(process)
            process.communicate()
            raise TimeoutError from None
        finally:
            self._processes.discard(process)
        return output, process.returncode

    def check(self, family: str, cases: Sequence[str]) -> Outcome:
        """Run cases without the sanitizer and then, where there is one, under it."""
        outcome, began = Outcome(family, list(cases)), time.monotonic()
        try:
            output, status = self.process(cases, sanitized=False)
            if status:
                outcome.failure = f"without the sanitizer: exit status {status}"
                outcome.report = [line for line in output.splitlines() if line.strip()][-_SHOWN_LINES:]
            elif self.sanitizer:
                read_report(outcome, *self.process(cases, sanitized=True))
        except TimeoutError:
            outcome.failure = "the time was over"
        outcome.seconds = time.monotonic() - began
        return outcome

    def check_family(self, family: str, cases: Sequence[str]) -> list[Outcome]:
        """The outcome of all cases together and, if it is bad, of each by itself."""
        together = self.check(family, cases)
        if together.good or len(cases) == 1 or time.monotonic() >= self.deadline:
            return [together]
        return [together, *(self.check(family, [case]) for case in cases)]

    def check_planted(self) -> list[Outcome]:
        """The planted error under the sanitizer alone: without it, nobody would notice."""
        outcome, began = Outcome(PLANTED, [PLANTED]), time.monotonic()
        try:
            read_report(outcome, *self.process([PLANTED], sanitized=True))
        except TimeoutError:
            outcome.failure = "the time was over"
        outcome.seconds = time.monotonic() - began
        return [outcome]

    def check_all(self, at_once: int) -> Iterator[list[Outcome]]:
        """Outcomes, a family after the other; so many are run at once."""
        with ThreadPoolExecutor(at_once) as pool:
            try:
                jobs = [pool.submit(self.check_planted)] if self.sanitizer else []
                jobs += [pool.submit(self.check_family, name, list(of)) for name, of in kernel_cases.FAMILIES.items()]
                for job in jobs:
                    yield job.result()
            finally:
                self.stop()


def run_cases(cases: Sequence[str], device: torch.device) -> None:
    """Run cases in this process, each to its end before the next begins.

    Raises:
        UserError: there is no case of that name.
    """
    for case in cases:
        if case == PLANTED and device.type == "cuda":
            from benchmarks.planted_error import read_past_the_end

            read_past_the_end(device)
        elif case in kernel_cases.CASES:
            kernel_cases.make(case, device, ROWS[device.type])()
        else:
            raise UserError(f"--run {case!r}: there is no such case; accepted are {', '.join(kernel_cases.CASES)}")
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"done: {case}", flush=True)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """In a word: "clean", "errors", or "failed" where something did not run to its end or the
    sanitizer is blind.
    """
    if all(o.good for o in outcomes):
        return "clean"
    return "errors" if any(o.errors for o in outcomes if o.family != PLANTED) else "failed"


def print_outcome(console: Console, outcome: Outcome) -> None:
    """One line and, where it is bad, what the sanitizer said."""
    found = outcome.failure or ("" if outcome.errors is None else f"{outcome.errors} errors") or "ran"
    colour = "green" if outcome.good else "red"
    console.print(
        f"[{colour}]{found}[/{colour}]: {outcome.family}: {', '.join(outcome.cases)} ({outcome.seconds:.0f} s)",
        soft_wrap=True,
    )
    if outcome.family == PLANTED and not outcome.good:
        console.print("the error that was planted was not found: what is clean here means nothing")
    for line in [] if outcome.good else outcome.report:
        console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Check everything and write the file as it comes; the exit status."""
    device = torch.device(arguments.device)
    path = arguments.output or report.ROOT / "runs" / "sanitize.json"
    content: dict[str, Any] = {
        "benchmark": "sanitize",
        "format": 1,
        "complete": False,
        "status": "not_run",
        "reason": "",
        "environment": report.environment("benchmarks.sanitize", device, PACKAGES),
        "tool": None,
        "rows": ROWS[device.type],
        "cases": [],
    }
    console.print(report.describe(content["environment"]), style="dim")
    command: list[str] = []
    if arguments.quick:
        content["reason"] = "the cases ran without the sanitizer"
    elif (sanitizer := find_sanitizer()) is not None:
        command = [sanitizer, *options_of(sanitizer)]
        content["tool"] = {"command": command, "version": version_of(sanitizer)}
    else:
        content["reason"] = "compute-sanitizer is not on the PATH, in CUDA_HOME/bin or in /usr/local/cuda/bin"
        return _finish(content | {"complete": True}, path, console)
    outcomes: list[Outcome] = []
    runner = Runner(command, device.type, time.monotonic() + arguments.limit)
    with contextlib.suppress(KeyboardInterrupt), report.progress(console) as bar, terminate_as_interrupt():
        task = bar.add_task("memcheck" if command else "cases", total=len(kernel_cases.FAMILIES) + bool(command))
        for found in runner.check_all(AT_ONCE if device.type == "cuda" else 1):
            outcomes += found
            content["cases"] = [asdict(o) for o in outcomes]
            report.write_json(path, content)
            for outcome in found:
                print_outcome(console, outcome)
            bar.advance(task)
        content["complete"] = True
    status = verdict(outcomes) if content["complete"] else "failed"
    if command or status != "clean":
        content["status"] = status
    return _finish(content, path, console)


def _finish(content: dict[str, Any], path: Path, console: Console) -> int:
    """Write the file for the last time and say how it went; the exit status."""
    report.write_json(path, content)
    status, reason = content["status"].replace("_", " "), content["reason"]
    console.print(f"{status}: {reason}" if reason else status, soft_wrap=True)
    console.print(f"figures: {path}", soft_wrap=True)
    return int(content["status"] in ("errors", "failed"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, rest = (__doc__ or "").partition("\n\n")
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.sanitize",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--output", type=Path, help="JSON file; default runs/sanitize.json")
    add("--limit", type=float, default=LIMIT, help="seconds after which all is stopped; default %(default)g")
    add("--quick", action="store_true", help="run the cases without the sanitizer, also on a CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--run", nargs="+", metavar="CASE", help="run cases in this process and do nothing else")
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    try:
        if not arguments.limit > 0:
            raise UserError(f"--limit is {arguments.limit:g}; it must be above 0")
        if arguments.device == "auto":
            arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
        if arguments.run:
            run_cases(arguments.run, torch.device(arguments.device))
            return 0
        if arguments.device == "cpu" and not arguments.quick:
            raise UserError(
                "compute-sanitizer needs a CUDA GPU, and torch sees none here; --quick runs the cases alone"
            )
        return run(arguments, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
