"""Kernels that were compiled beforehand are found after their cache has moved."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(cache: Path, *arguments: str) -> str:
    """The command, on a cache; what it prints."""
    command = [sys.executable, "-m", "benchmarks.precompile", "--cache", str(cache), *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.nightly
def test_nothing_is_compiled_again_after_a_move(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="compiling needs triton")
    here, there = tmp_path / "here", tmp_path / "there"
    assert "kernels for sm_90" in run(here, "--parts", "rows")
    kernels = {file.relative_to(here): file.stat().st_mtime_ns for file in here.rglob("*.cubin")}
    assert len(kernels) > 20
    shutil.copytree(here, there)
    shutil.rmtree(here)
    run(there, "--moved")
    run(there, "--parts", "rows")
    assert {file.relative_to(there): file.stat().st_mtime_ns for file in there.rglob("*.cubin")} == kernels
