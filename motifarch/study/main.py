"""`motifarch benchmark head-ratio`: variants of attention, made equal, trained and reported."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from motifarch.command_line import Parser, loading, option, path
from motifarch.field_types import FilePath, Rows
from motifarch.study.grid import GRIDS, read_grid
from motifarch.yaml_text import parse_yaml


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's own options; all others are the grid's fields."""
    parser = Parser(
        prog="motifarch benchmark head-ratio",
        usage="%(prog)s STUDY.yaml --output DIR [options] [--field VALUE ...]",
        description="Train variants of attention made equal in cost, over sizes and seeds, and report what differs. "
        "Interrupted, the same command goes on where it was.",
        examples=[
            "motifarch benchmark head-ratio study/tiny_cpu --output studies/tiny_cpu --dry-run",
            "motifarch benchmark head-ratio study/tiny_cpu --output studies/tiny_cpu --jobs 2 --threads 1",
        ],
        add_help=False,
    )
    parser.add_argument(
        "study", type=option(FilePath), metavar="STUDY.yaml", help="the grid: variants, sizes, seeds, tokens"
    )
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="everything is written there")
    parser.add_argument("--dry-run", action="store_true", help="print the matched variants and stop")
    parser.add_argument(
        "--jobs", type=option(Rows), metavar="N", help="runs side by side (default: one a GPU; on a CPU, 1)"
    )
    parser.add_argument(
        "--threads", type=option(Rows), metavar="N", help="CPU threads of a run (default: cores / jobs)"
    )
    parser.add_argument(
        "--submitit",
        type=_mapping,
        metavar="OPTIONS",
        help="make each run a job of a SLURM cluster: submitit's parameters, such as '{slurm_partition: gpu}'",
    )
    parser.add_argument(
        "--retry-failed", action="store_true", help="try failed runs again, from their last checkpoints"
    )
    parser.add_argument(
        "--compare", type=path, metavar="OLD.json", help="show what moved since an earlier study's results.json"
    )
    return parser


def _mapping(text: str) -> dict[str, Any]:
    found = parse_yaml(text, f"--submitit {text}")
    if not isinstance(found, dict) or not found:
        raise argparse.ArgumentTypeError(f"is {text!r}; give a mapping such as '{{slurm_partition: gpu}}'")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a study as a command line says.

    Args:
        argv: ``STUDY.yaml --output DIR ... --field value ...``; the process's own where None.

    Returns:
        0 if every run finished; 1 if some failed; 130 or 143 after Ctrl-C or SIGTERM, and the same
        command goes on.

    Raises:
        UserError: something that the user can mend.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(args):
        names = args[max(args.index(flag) for flag in ("-h", "--help") if flag in args) + 1 :]
        if not names:
            build_parser().print_help()
            print()
        GRIDS.print_fields(names)
        return 0
    options, fields = build_parser().parse_known_args(args)
    grid = read_grid([options.study, *fields])

    # Heavy imports only after the grid has been read, so that a slip in it is reported at once.
    with loading():
        from motifarch.study.analysis import read_results
        from motifarch.study.data import describe, ensure_data
        from motifarch.study.matching import match, print_matched
        from motifarch.study.run import run_study

    console = Console(highlight=False)
    options.compare = read_results(options.compare) if options.compare else None
    manifest = ensure_data(grid.data, dry_run=options.dry_run)
    sequences = describe(grid.data, manifest)
    matched = match(grid, sequences)
    print_matched(grid, matched, console)
    if manifest is None or options.dry_run:
        return 0
    command = shlex.join(["motifarch", "benchmark", "head-ratio", *args])
    return run_study(
        grid,
        matched,
        options,
        command=command,
        fingerprint=manifest.fingerprint,
        sequences=sequences,
        console=console,
    )
