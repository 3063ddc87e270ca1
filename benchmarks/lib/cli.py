"""What all benchmarks' command lines share: options, the device, results, time limits."""

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib.report import RESULTS, ROOT, busy_warning, describe, environment
from motifarch.errors import UserError


def bare_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line without options.

    Args:
        module: as in ``python -m MODULE``.
        doc: its docstring: the first paragraph is the summary, the rest stands below the options.
    """
    summary, _, rest = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options that every timed benchmark has; see :func:`bare_parser`."""
    made = bare_parser(module, doc)
    add = made.add_argument
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads; default %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto is a GPU if there is one")
    add("--output", type=Path, help="JSON file, a plot beside it; default benchmarks/results/NAME_DEVICE.json")
    add("--quick", action="store_true", help="tiny sizes, a smoke test; writes to runs/ unless told otherwise")
    return made


def resolve_device(arguments: argparse.Namespace, positive: Sequence[str] = ()) -> torch.device:
    """The device that is asked for; ``arguments.device`` becomes its name, and the threads are set.

    Args:
        arguments: of :func:`parser`.
        positive: further options whose values must be above 0.

    Raises:
        UserError: an option has no meaning or cannot be had here.
    """
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA GPU here; use --device cpu")
    for name in ("threads", *positive):
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0")
    torch.set_num_threads(arguments.threads)
    return torch.device(arguments.device)


def device_slug(device: torch.device) -> str:
    """The device for a file's name: cpu, nvidia_h100 or nvidia_h100_pcie, without memory sizes."""
    if device.type != "cuda":
        return device.type
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "_".join(word for word in words if not re.fullmatch(r"\d+gb|hbm\d\w*", word))


def results_path(benchmark: str, arguments: argparse.Namespace, device: torch.device) -> Path:
    """Where a benchmark's JSON goes."""
    quick, default = ROOT / "runs" / f"{benchmark}_quick.json", RESULTS / f"{benchmark}_{device_slug(device)}.json"
    path: Path = arguments.output or (quick if arguments.quick else default)
    return path


def introduce(module: str, device: torch.device, packages: Iterable[str], console: Console) -> dict[str, Any]:
    """Print the machine, and a warning if it is busy; the environment for the JSON file."""
    env = environment(module, device, packages)
    console.print(describe(env), style="dim")
    if warning := busy_warning(env):
        console.print(f"warning: {warning}", style="yellow")
    return env


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """A time limit's SIGTERM ends the measuring as ctrl-C does, keeping what there is."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resumed_status(run: Callable[[], int]) -> int:
    """`exit_status` of what the same command goes on with: 130 after ctrl-C or a time limit."""

    def work() -> int:
        try:
            with terminate_as_interrupt():
                return run()
        except KeyboardInterrupt:
            print("stopped; the same command goes on", file=sys.stderr)
            return 130

    return exit_status(work)


def exit_status(run: Callable[[], int]) -> int:
    """The status that ``run`` returns; 2 and one line for what the user can mend."""
    try:
        return run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
