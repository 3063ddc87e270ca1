"""The attention kernels compile within their bounds with every release of Triton supported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.lib import lints, report

pytest.importorskip("triton", reason="compiling needs triton")

# What torch 2.11, 2.13 (pinned), 2.14 and 2.15, the newest, bring.
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
SHARED_MEMORY = 227 * 1024  # bytes a block may use


def release(version: str) -> Path:
    """The folder of a release of Triton, fetched from the package index once."""
    folder = report.ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", f"{folder}.part"]
        subprocess.run([*command, f"triton=={version}"], check=True)
        Path(f"{folder}.part").rename(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", ["motif", "motif_gluon"])
def test_attention_compiles_within_bounds(version: str, family: str, tmp_path: Path) -> None:
    path = [str(release(version)), str(report.ROOT), *sys.path]
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-m", "benchmarks.compiled", "--worker", "90", family]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"triton {version} does not compile {family}: {done.stderr[-2000:]}"
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["triton"] for k in kernels} == {version}
    # Where Triton's Gluon is another, the Triton kernels serve.
    on_gluon = any(k["kernel"].startswith("gluon") for k in kernels)
    assert on_gluon == (family == "motif_gluon" and version in ("3.6.0", "3.7.1"))
    new, _ = lints.judge(kernels)
    assert not new, f"triton {version}"
    assert not [k for k in kernels if k["shared"] > SHARED_MEMORY], f"triton {version}"
