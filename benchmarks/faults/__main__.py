"""What faults do to a run: kills at random times, damages of its files, a checkpoint that is code.

    python -m benchmarks.faults                          # all; an hour on two cores
    python -m benchmarks.faults kills --kills 20         # one part

A tiny model trains on two processes. Counted are checkpoints and rows of metrics that were lost,
processes left ten seconds after a kill, results that differ in a bit from those of a run that
nothing disturbed, and starts that end without a message of their own. All of it should be 0.
"""

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.faults.damages import Damaging
from benchmarks.faults.kills import Killing
from benchmarks.faults.pickles import try_pickles
from benchmarks.lib import cli, report
from motifarch.counted import counted
from motifarch.errors import UserError

PARTS = ("pickles", "kills", "damages")


def main(argv: list[str] | None = None) -> int:
    """Runs the parts, prints and writes the counts; 1 where there were faults."""
    parser = cli.bare_parser("benchmarks.faults", __doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="default %(default)s")
    parser.add_argument("--damages", type=int, default=100, metavar="N", help="of each file; default %(default)s")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="damages tried side by side")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="for each part, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=report.RESULTS / "faults.json", help="JSON file")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        raise UserError(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    console = Console(highlight=False, soft_wrap=True)
    env = cli.introduce("benchmarks.faults", torch.device("cpu"), ("torch", "motifarch"), console)
    folder = Path(tempfile.mkdtemp(prefix="motifarch-faults-"))
    killing, damaging = Killing(folder / "kills", arguments.seed), Damaging(folder / "damages", arguments.seed)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "pickles": lambda: try_pickles(folder / "pickles"),
        "kills": lambda: killing.run(arguments.kills, console.print, 60 * arguments.minutes),
        "damages": lambda: damaging.run(arguments.damages, console.print, 60 * arguments.minutes, jobs=arguments.jobs),
    }
    found: dict[str, Any] = {"benchmark": "faults", "environment": env, "seed": arguments.seed}
    faults = 0
    for name in arguments.parts or PARTS:
        began = time.monotonic()
        found[name] = parts[name]() | {"seconds": round(time.monotonic() - began)}
        report.write_json(arguments.output, found)
        for what, count in found[name]["counts"].items():
            console.print(f"{name:<10}{count:>6}  {what}")
        for fault in found[name]["faults"]:
            console.print(f"{name:<10} fault  {fault}")
        faults += len(found[name]["faults"])
    where = f"the files are in {folder}" if faults else f"written: {arguments.output}"
    console.print(f"{counted(faults, 'fault')}; {where}")
    if not faults:
        shutil.rmtree(folder, ignore_errors=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(cli.exit_status(main))
