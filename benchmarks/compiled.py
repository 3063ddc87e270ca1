"""What every shipped kernel configuration needs of a GPU: registers, spills, shared and tensor
memory. No GPU needed.

    python -m benchmarks.compiled                        # some ten minutes of two cores, less with Triton's cache

Each kernel is compiled for Hopper (sm_90) and Blackwell (sm_100) exactly as it would be launched,
and read with the cuobjdump that triton brings. benchmarks/results/compiled.json has every
configuration; the tests compile them again and hold them to bounds, and to that file where triton's
version is the same. Nothing here is a time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.kernels import terminate_as_interrupt
from benchmarks.lib import report

MODULE = "benchmarks.compiled"
FAMILIES = ("poly_norm", "combine", "attention", "decoding")
ARCHITECTURES = {90: "Hopper", 100: "Blackwell"}
NEEDS = ("registers", "stack", "shared", "tensor_memory")


def compile_family(arch: int, family: str) -> list[dict[str, Any]]:
    """Every configuration of a family of kernels, in a fixed order.

    Args:
        arch: 90 or 100.
        family: one of FAMILIES.

    Returns:
        For each: family, kernel, arch, registers and stack bytes (spills) a thread, shared memory
        bytes and tensor memory columns a block, and the constants that it was compiled with.

    Raises:
        RuntimeError: it did not compile.
    """
    # A process of its own: whether kernels are interpreted is decided when triton is imported.
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(report.ROOT), *sys.path])}
    command = [sys.executable, "-m", "benchmarks.compiled_kernels", "--json", str(arch), family]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise RuntimeError(f"{family} does not compile for sm_{arch}: {done.stderr.strip()}")
    found = [{"family": family, **json.loads(line)} for line in done.stdout.splitlines()]
    return sorted(found, key=lambda usage: json.dumps(usage, sort_keys=True))


def summarise(kernels: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The most that any configuration of a kernel needs, and how many configurations there are, by
    kernel and arch.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for usage in kernels:
        groups.setdefault((usage["kernel"], usage["arch"]), []).append(usage)
    return [
        {"kernel": kernel, "arch": arch, "configurations": len(group), **{n: max(u[n] for u in group) for n in NEEDS}}
        for (kernel, arch), group in sorted(groups.items())
    ]


def print_summary(console: Console, kernels: Sequence[dict[str, Any]]) -> None:
    """A table of it."""
    rows = [
        (
            row["kernel"].replace("._", ".").removesuffix("_kernel"),
            f"sm_{row['arch']}",
            str(row["configurations"]),
            *(str(row[name]) for name in ("registers", "stack")),
            f"{row['shared'] / 1024:.0f}",
            str(row["tensor_memory"] or "-"),
        )
        for row in summarise(kernels)
    ]
    headings = ("kernel", "for", "ways", "registers", "spilled", "shared\nKiB", "tensor\nmemory")
    console.print(report.table("The most that any configuration needs", headings, rows, text_columns=2))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    summary, *_ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=summary)
    add = parser.add_argument
    add("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    add("--jobs", type=int, default=2, help="compilations side by side; default %(default)s")
    add("--output", type=Path, help="JSON file; default benchmarks/results/compiled.json, for some families runs/")
    options = parser.parse_args(argv)
    console = Console()
    whole = set(options.families) == set(FAMILIES)
    path = options.output or (report.RESULTS if whole else report.ROOT / "runs") / "compiled.json"
    work = [(arch, family) for family in options.families for arch in ARCHITECTURES]
    kernels: list[dict[str, Any]] = []
    with terminate_as_interrupt(), report.progress(console) as bar, ThreadPoolExecutor(options.jobs) as pool:
        task = bar.add_task("compiling", total=len(work))
        for (arch, family), found in zip(work, pool.map(lambda job: compile_family(*job), work), strict=True):
            kernels += found
            bar.update(task, advance=1, description=f"{family} for sm_{arch}: {len(found)} kernels")
    env = report.environment(MODULE, torch.device("cpu"), ("motifarch", "triton"))
    report.write_json(path, {"benchmark": "compiled", "format": 1, "environment": env, "kernels": kernels})
    print_summary(console, kernels)
    console.print(f"all configurations: {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
