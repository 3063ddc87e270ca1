"""`motifarch benchmark all`: the benchmarks that this machine can run, one after another, joined in
one report.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from motifarch.errors import UserError

RESULTS = "all.json"
KIND, FORMAT = "all_benchmarks", 1
_PACKAGES = ("motifarch", "torch", "triton", "transformers", "flash-attn", "flash-attn-4", "liger-kernel")


@dataclass(frozen=True)
class Part:
    """A benchmark. Sizes are its own business: it knows what suits a CPU and what a GPU."""

    name: str
    title: str
    minutes: tuple[float, float]
    """What it takes on a CPU and on a GPU, for the time left."""


PARTS = (
    Part("attention", "Attention", (4, 4)),
    Part("poly_norm", "PolyNorm", (5, 2)),
    Part("combine", "The epilogue of differential attention", (5, 2)),
    Part("train_step", "A training step", (12, 4)),
    Part("decode", "Decoding", (12, 6)),
    Part("study", "The head-ratio study", (90, 240)),
)
_QUICK_MINUTES = 0.7
_STUDIES = ("tiny_cpu.yaml", "gpu_50m.yaml")  # on a CPU, on a GPU


class _Parser(argparse.ArgumentParser):
    """Refuses as the rest of motifarch does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see motifarch benchmark all --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    names = [part.name for part in PARTS]
    parser = _Parser(
        prog="motifarch benchmark all",
        description="Run the kernel, training-step, decoding and study benchmarks that this machine can, and join "
        "their figures and pictures in DIR/report.html and report.md. What has finished in DIR is kept: the same "
        "command goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="everything is written there")
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--study", type=Path, metavar="STUDY.yaml", help=f"default: recipes/study/{' or '.join(_STUDIES)} on a GPU")
    add("--quick", action="store_true", help="tiny sizes, which prove that all of it runs; a study only with --study")
    add("--again", action="store_true", help="measure anew what has finished in DIR")
    add("--compare", type=Path, metavar="OLD.json", help="show what moved since: an all.json or results.json")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs benchmarks as a command line says.

    Args:
        argv: ``--output DIR ...``; the process's own where None.

    Returns:
        0 if none failed; 1 if some did; 128 plus the signal's number after Ctrl-C or SIGTERM.

    Raises:
        UserError: something that the user can mend.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(args)
    root = repository()

    # Heavy imports only once the command line has been read.
    from motifarch.study.comparison import read_results

    old = read_results(options.compare) if options.compare else None
    if options.study and not options.study.is_file():
        raise UserError(f"--study {options.study} is no file; give a study's YAML, such as recipes/study/{_STUDIES[0]}")
    command = shlex.join(["motifarch", "benchmark", "all", *args])
    try:
        (options.output / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output} can't be made: {error.strerror}; give another folder") from None
    return Benchmarks(root, options, command).run(old)


def repository(beside: Path | None = None, here: Path | None = None) -> Path:
    """The repository's root, which has the benchmarks' scripts.

    Args:
        beside: where the package lies; default: this one.
        here: the folder to look in otherwise; default: the current one.

    Raises:
        UserError: they are in neither place: motifarch was installed without its repository.
    """
    places = [beside or Path(__file__).resolve().parents[2], here or Path.cwd()]
    for place in places:
        if all((place / "benchmarks" / f"{part.name}.py").is_file() for part in PARTS if part.name != "study"):
            return place
    raise UserError(
        f"the benchmarks' scripts are neither in {places[0] / 'benchmarks'} nor in {places[1] / 'benchmarks'}: they "
        "are no part of an installed motifarch; clone its repository and run this command in its root"
    )


class Benchmarks:
    """All parts of a run, and the file that joins them."""

    def __init__(self, root: Path, options: argparse.Namespace, command: str) -> None:
        """Reads what an earlier run left in the output folder.

        Args:
            root: the repository's.
            options: of the command line.
            command: the command line itself, for the record.
        """
        import torch
        from rich.console import Console

        from motifarch.environment import environment

        self.root, self.options, self.output = root, options, options.output.resolve()
        self.cuda = torch.cuda.is_available()
        self.console = Console(highlight=False, soft_wrap=True)
        device = torch.device("cuda" if self.cuda else "cpu")
        self.content: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "command": command,
            "environment": environment(command, device, _PACKAGES),
            "parts": [],
        }
        self._parts: dict[str, dict[str, Any]] = {p["name"]: p for p in _read(self.output / RESULTS).get("parts", ())}

    def run(self, old: dict[str, Any] | None) -> int:
        """Runs what is asked for, reports, and compares with old results where there are any; the
        exit status.
        """
        from motifarch.study.comparison import compare, show
        from motifarch.study.report import write_report
        from motifarch.train.stop import StopSignals

        chosen = [part for part in PARTS if part.name in (self.options.only or [p.name for p in PARTS])]
        with StopSignals() as signals, self._bar() as bar:
            task = bar.add_task("", total=sum(map(self._seconds, chosen)), state="")
            for i, part in enumerate(chosen):
                show_progress = functools.partial(self._show, bar, task, chosen[: i + 1], chosen[i + 1 :])
                self._parts[part.name] = self._do(part, lambda: signals.received, show_progress)
                self._keep()
                if signals.received:
                    break
        if signals.received:
            self.console.print("stopped; the same command keeps what has finished and goes on")
            return 128 + signals.received
        self._name_what_cannot_run()
        self._keep()
        if old is not None:
            self.content["comparison"] = compare(self.content, old)
            show(self.content["comparison"], self.console)
            self._keep()
        write_report(self.content, self.output)
        self.console.print(f"written: {self.output / RESULTS}, report.html, report.md")
        return int(any(self._parts[part.name]["status"] == "failed" for part in chosen))

    def _keep(self) -> None:
        """Writes what there is, with the parts that this run was not asked for or has not come to
        yet.
        """
        from motifarch.files import write_json

        order = [part.name for part in PARTS]
        known = sorted(self._parts, key=lambda name: order.index(name) if name in order else len(order))
        self.content["parts"] = [self._parts[name] for name in known]
        write_json(self.output / RESULTS, self.content)

    def _show(
        self, bar: Progress, task: TaskID, begun: Sequence[Part], rest: Sequence[Part], elapsed: float, line: str
    ) -> None:
        """Moves the bar: the last of those begun is at work, for so many seconds, and printed that
        line last.
        """
        spent, expected = sum(map(self._seconds, begun[:-1])), self._seconds(begun[-1])
        # One that takes longer than expected leaves the bar just short of its end.
        done = min(elapsed, 0.98 * expected)
        left = expected - done + sum(map(self._seconds, rest))
        state = f"about {_minutes(left)} left  {line}"
        bar.update(task, completed=spent + done, description=begun[-1].title, state=state)

    def _bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[state]}"),
        )
        return Progress(*columns, console=self.console, disable=not self.console.is_terminal)

    def _seconds(self, part: Part) -> float:
        return 60 * (_QUICK_MINUTES if self.options.quick else part.minutes[self.cuda])

    def _do(self, part: Part, stopped: Callable[[], int], show: Callable[[float, str], None]) -> dict[str, Any]:
        """Runs a part, or says why not; what came of it."""
        entry: dict[str, Any] = {"name": part.name, "title": part.title, "pictures": []}
        if reason := self._cannot(part):
            self.console.print(f"{part.title}: not run: {reason}")
            return {**entry, "status": "not_run", "reason": reason}
        command, result = self._command(part)
        before = None if self.options.again else self._parts.get(part.name)
        if before and before["status"] == "finished" and before["command"] == shlex.join(command):
            self.console.print(f"{part.title}: kept from {before['content']['environment']['date']}")
            return before
        log = self.output / "logs" / f"{part.name}.log"
        entry |= {"command": shlex.join(command), "log": str(log.relative_to(self.output))}
        self.console.print(f"{part.title}: begun; {log} has what it prints")
        # What lies there is of another run: a part that fails must not be reported with it.
        if part.name != "study":
            for path in (result, *self.output.glob(f"{part.name}*.png")):
                path.unlink(missing_ok=True)
        began = time.monotonic()
        status = self._process(command, log, stopped, lambda line: show(time.monotonic() - began, line))
        entry |= {"seconds": round(time.monotonic() - began, 1), **_outcome(status, result, log, stopped())}
        if entry["status"] == "finished":
            found = sorted(self.output.glob(f"{part.name}*.png"))
            entry["pictures"] = [path.name for path in found]
        reason = f": {entry['reason']}" if entry["reason"] else ""
        self.console.print(f"{part.title}: {entry['status']} after {_minutes(entry['seconds'])}{reason}")
        return entry

    def _cannot(self, part: Part) -> str | None:
        if part.name != "study":
            return None
        if self.options.quick and self.options.study is None:
            return "a study takes hours, and this is --quick; give a small one as --study STUDY.yaml"
        study = self._study()
        return None if study.is_file() else f"there is no {study}; give one as --study STUDY.yaml"

    def _study(self) -> Path:
        given: Path | None = self.options.study
        return given.resolve() if given else self.root / "recipes" / "study" / _STUDIES[self.cuda]

    def _command(self, part: Part) -> tuple[list[str], Path]:
        """The command line and the JSON file that it writes."""
        if part.name == "study":
            words = ["-m", "motifarch.cli", "benchmark", "head-ratio", str(self._study())]
            return [
                sys.executable,
                *words,
                "--output",
                str(self.output / "study"),
            ], self.output / "study" / "results.json"
        result = self.output / f"{part.name}.json"
        quick = ["--quick"] if self.options.quick else []
        return [sys.executable, "-m", f"benchmarks.{part.name}", "--output", str(result), *quick], result

    def _process(self, command: list[str], log: Path, stopped: Callable[[], int], show: Callable[[str], None]) -> int:
        """Runs a command to its end, or until the user has had enough; its exit status."""
        paths = [str(self.root), str(self.root / "kernels"), os.environ.get("PYTHONPATH", "")]
        added = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
        tied = [sys.executable, "-m", "motifarch.study.tied", str(os.getpid()), *command]
        with log.open("wb") as file:
            process = subprocess.Popen(
                tied,
                cwd=self.root,
                env=os.environ | added,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )
            while process.poll() is None:
                if stopped():
                    process.terminate()
                    try:
                        return process.wait(timeout=60)
                    except subprocess.TimeoutExpired:
                        process.kill()
                show(_last_line(log))
                time.sleep(0.3)
        return process.returncode

    def _name_what_cannot_run(self) -> None:
        """A machine without a GPU has measured the paths for a CPU, which is not what most read the
        report for.
        """
        if self.cuda or self.options.only:
            return
        reason = "torch sees no GPU here; the kernels above are those that a CPU runs"
        title = "Fused kernels, training and decoding on a GPU"
        self._parts["gpu"] = {"name": "gpu", "title": title, "status": "not_run", "reason": reason, "pictures": []}
        self.console.print(f"{title}: not run: {reason}")


def _read(path: Path) -> dict[str, Any]:
    """An earlier all.json; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and content.get("kind") == KIND else {}


def _outcome(status: int, result: Path, log: Path, stopped: int) -> dict[str, Any]:
    """What came of a process: figures that are whole count, whatever it had to complain about
    beside them.
    """
    if stopped:
        return {"status": "failed", "reason": "stopped by the user"}
    try:
        content = json.loads(result.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        last = _last_line(log, 200) or "it printed nothing"
        return {"status": "failed", "reason": f"exit status {status}, no figures; the last line it printed: {last}"}
    if content.get("complete") is False:
        return {"status": "failed", "reason": f"exit status {status}, before it had measured everything"}
    reason = f"exit status {status}: its log says what went wrong beside the figures" if status else None
    return {"status": "finished", "reason": reason, "content": content}


def _last_line(log: Path, limit: int = 48) -> str:
    """The last line of a log that says something."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return next((line.strip()[:limit] for line in reversed(lines) if line.strip()), "")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
