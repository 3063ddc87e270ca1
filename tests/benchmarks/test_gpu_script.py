"""benchmarks/gpu.sh with a stand-in for python: which parts run, what a failure does, what is
packed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("timeout") is None, reason="needs bash and GNU coreutils"
)

# Sees no GPU; poly_norm fails, the others write what they were asked for.
STAND_IN = """#!/bin/bash
if [[ $1 == -c ]]; then
  [[ $2 == *cuda* ]] && exit 1
  echo "version"; exit 0
fi
echo "arguments: $*"
[[ $2 == benchmarks.ops.poly_norm ]] && { echo "a typing error" >&2; exit 3; }
[[ $2 == benchmarks.ops.combine && -n $HANG ]] && sleep 60
while [[ $# -gt 0 ]]; do [[ $1 == --output ]] && echo "{}" >"$2"; shift; done
exit 0
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    return os.environ | {"PYTHON": str(stand_in), "HANG": ""}


def gpu(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def packed(out: Path) -> set[str]:
    with tarfile.open(out / "results.tar.gz") as archive:
        return set(archive.getnames())


def test_a_part_that_fails_is_named_and_the_next_ones_run(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu(environment, out)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "failed: poly_norm"
    assert "a typing error" in (out / "poly_norm.log").read_text()
    assert "== poly_norm: FAILED with exit status 3" in done.stdout
    measured = ("attention", "combine", "decode", "train_2.6b")
    assert packed(out) >= {"gpu.log", "tests.log", "poly_norm.log"} | {
        f"{m}.{s}" for m in measured for s in ("log", "json")
    }
    assert "results.tar.gz" not in packed(out)
    for name in ("train_300m", "memcheck", "study", "tune"):
        assert not (out / f"{name}.log").exists()
    assert "--quick" in (out / "combine.log").read_text()


def test_only_the_parts_that_are_named_run(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    done = gpu(environment, out, "combine", "tests")
    assert done.returncode == 0, done.stdout
    assert packed(out) == {"gpu.log", "tests.log", "combine.log", "combine.json"}
    assert re.fullmatch(r"arguments: -m pytest -m gpu -q tests/kernels -n \d+\n", (out / "tests.log").read_text())


def test_an_unknown_part_is_refused_with_the_known_ones(environment: dict[str, str], tmp_path: Path) -> None:
    done = gpu(environment, tmp_path / "out", "poly")
    assert done.returncode == 2
    assert "there is no part poly" in done.stderr
    known = "tests attention poly_norm combine decode train_2.6b; on request: train_300m memcheck study tune\n"
    assert f"parts: {known}" in done.stderr


def test_the_limits_of_a_call_add_up_to_ten_minutes_at_most() -> None:
    by_default, on_request = SCRIPT.read_text().split("on_request=(", 1)

    def limits(text: str) -> list[int]:
        return [int(limit) for limit in re.findall(r'^  "\S+ +(\d+) -m ', text, flags=re.MULTILINE)]

    assert len(limits(by_default)) == 6
    assert sum(limits(by_default)) < 600
    assert len(limits(on_request)) == 4
    assert max(limits(on_request)) < 600


def test_a_part_on_request_runs_when_it_is_named(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu(environment, out, "tune")
    assert done.returncode == 0, done.stdout
    assert packed(out) == {"gpu.log", "tune.log", "tune.json"}
    assert f"-m benchmarks.tuning.tune --limit 500 --output {out}/tune.json --quick" in (out / "tune.log").read_text()


def test_what_there_is_is_packed_when_the_script_is_stopped(environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["bash", str(SCRIPT), str(out), "tests", "combine"]
    process = subprocess.Popen(command, env=environment | {"HANG": "1"}, stdout=subprocess.DEVNULL)
    log = out / "combine.log"
    deadline = time.monotonic() + 30
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    assert packed(out) >= {"gpu.log", "tests.log", "combine.log"}
    assert "stopped in combine" in (out / "gpu.log").read_text()
