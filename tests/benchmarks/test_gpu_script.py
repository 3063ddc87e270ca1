"""benchmarks/gpu.sh runs through on a machine without a GPU, with a stand-in for python."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"

# Sees no GPU and has no datasets; poly_norm fails, the others write what they were asked for.
STAND_IN = """#!/bin/bash
if [[ $1 == -c ]]; then
  [[ $2 == *cuda* || $2 == *datasets* ]] && exit 1
  echo "version"; exit 0
fi
echo "arguments: $*"
[[ $2 == *poly_norm ]] && { echo "a typing error" >&2; exit 3; }
while [[ $# -gt 0 ]]; do [[ $1 == --output ]] && echo "{}" >"$2"; shift; done
exit 0
"""


# Says what it is asked to look for, and runs the program.
SANITIZER = """#!/bin/bash
echo "looks for: $*"
until [[ $1 == */python ]]; do shift; done
exec "$@"
"""


def parts_run(out: Path) -> list[str]:
    """By the log, in order."""
    lines = (out / "gpu.log").read_text().splitlines()
    return [line.split()[1].rstrip(",") for line in lines if line.startswith("== ") and ", at most" in line]


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("timeout") is None, reason="needs bash and GNU coreutils")
def test_every_part_runs_and_what_failed_or_was_skipped_is_named(tmp_path: Path) -> None:
    tools, out = tmp_path / "tools", tmp_path / "a folder"
    tools.mkdir()
    for name, text in (("python", STAND_IN), ("compute-sanitizer", SANITIZER)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHON": str(tools / "python"), "PATH": path}

    def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), str(out), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    first = gpu()
    assert first.returncode == 0, first.stdout + first.stderr
    # What is wrong is found before anything is tuned or timed.
    assert parts_run(out) == ["memcheck", "racecheck", "tests", "tune", "attention"]
    assert "skipped: compile" in first.stdout  # there is nothing to compile for
    assert re.search(r"^(commit|tree) [0-9a-f]{40}", (out / "gpu.log").read_text(), re.MULTILINE)
    for tool in ("memcheck", "racecheck"):
        assert f"looks for: --tool {tool} " in (out / f"{tool}.log").read_text()

    named = ["poly_norm", "combine", "decode", "train_2.6b", "train_300m", "consan", "study", "tune_all"]
    done = gpu(*named)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-3:-1] == ["skipped: study", "failed: poly_norm"]
    assert "a typing error" in (out / "poly_norm.log").read_text()
    assert "--quick" in (out / "combine.log").read_text()
    logged = {*parts_run(out), "memcheck", "racecheck", "tests", "tune", "attention"} - {"study"}
    measured = logged - {"memcheck", "racecheck", "tests", "poly_norm", "consan"}
    with tarfile.open(out / "results.tar.gz") as archive:
        files = {"gpu.log", *(f"{name}.log" for name in logged), *(f"{name}.json" for name in measured)}
        assert set(archive.getnames()) == files
    unknown = gpu("poly")
    assert unknown.returncode == 2
    assert "there is no part poly" in unknown.stderr
