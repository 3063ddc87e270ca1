"""benchmarks/gpu.sh runs through on a machine without a GPU, with a stand-in for python."""

import os
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


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("timeout") is None, reason="needs bash and GNU coreutils")
def test_every_part_runs_and_what_failed_or_was_skipped_is_named(tmp_path: Path) -> None:
    stand_in, out = tmp_path / "python", tmp_path / "a folder"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    parts = ["tests", "attention", "poly_norm", "combine", "decode", "train_2.6b", "train_300m", "study", "tune"]
    environment = os.environ | {"PYTHON": str(stand_in)}

    def gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", str(SCRIPT), str(out), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = gpu(*parts)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-3:-1] == ["skipped: study", "failed: poly_norm"]
    assert "a typing error" in (out / "poly_norm.log").read_text()
    assert "--quick" in (out / "combine.log").read_text()
    measured = [name for name in parts if name not in ("tests", "poly_norm", "study")]
    with tarfile.open(out / "results.tar.gz") as archive:
        assert set(archive.getnames()) == {"gpu.log", "tests.log", "poly_norm.log"} | {
            f"{name}.{suffix}" for name in measured for suffix in ("log", "json")
        }
    unknown = gpu("poly")
    assert unknown.returncode == 2
    assert "there is no part poly" in unknown.stderr
