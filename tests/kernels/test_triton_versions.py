"""The attention kernels compile within their bounds with every release of Triton supported."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import lints, report

pytest.importorskip("triton", reason="compiling needs triton")

# What torch 2.11, 2.13 (pinned), 2.14 and 2.15, the newest, bring. The one that is installed
# compiles all there is in test_compilation.py.
VERSIONS = tuple(v for v in ("3.6.0", "3.7.1", "3.8.0", "3.9.0") if v != metadata.version("triton"))
WITH_GLUON = ("3.6.0", "3.7.1")  # elsewhere Gluon's interface is another: the Triton kernels serve


def release(version: str) -> Path:
    """The folder of a release of Triton, fetched from the package index once."""
    folder = report.ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}.part"]
        subprocess.run([*command, f"triton=={version}"], check=True)
        Path(f"{folder}.part").rename(folder)
    return folder


def compile_with(version: str, family: str, cache: Path) -> list[dict[str, Any]]:
    """What a family of kernels needs of an H100, compiled with a release of Triton."""
    path = [str(release(version)), str(report.ROOT), *sys.path]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "benchmarks.compiled", "--worker", "90", family]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"triton {version} does not compile {family}: {done.stderr[-2000:]}"
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["triton"] for k in kernels} == {version}
    return kernels


@pytest.mark.nightly
@pytest.mark.parametrize("version", VERSIONS)
def test_attention_compiles_within_bounds(version: str, tmp_path: Path) -> None:
    kernels = compile_with(version, "motif", tmp_path)
    on_gluon = compile_with(version, "motif_gluon", tmp_path)
    assert any(k["kernel"].startswith("gluon") for k in on_gluon) == (version in WITH_GLUON)
    new, gone = lints.judge(kernels + on_gluon)
    assert not new
    assert not gone
