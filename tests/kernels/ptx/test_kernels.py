"""Every kernel family as compiled, emulated: numbers, races, and planted faults.

Processes of their own: whether kernels are interpreted is decided when triton is imported, and the
tests' process interprets them.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.lib.report import ROOT

pytest.importorskip("triton", reason="compiling needs triton")


def lines(module: str, *arguments: str) -> list[dict[str, Any]]:
    """What a module of this folder prints, an object a line."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", f"tests.kernels.ptx.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "group",
    [
        pytest.param("attention", marks=pytest.mark.nightly),
        pytest.param("masks", marks=pytest.mark.nightly),
        *("decoding", "poly_norm", "combine", "hyper_connections", "expert_rows", "blackwell"),
    ],
)
def test_kernels_keep_the_error_rule_without_a_fault(group):
    found = lines("suite", group)
    assert len(found) >= 6
    assert not [line for line in found if line["problem"]]


@pytest.mark.nightly
def test_planted_faults_are_noticed():
    """Most barriers, waits and fences that are left out one at a time.

    Those that are missed order nothing that another does not, as far as the case goes: compilers
    put in some to be safe, and loops that end early wait for nothing.
    """
    for line in lines("planted"):
        noticed, missed = sum(line["noticed"].values()), len(line["missed"])
        assert noticed, line["kernel"]
        assert noticed > missed, line
        kinds = {kind for _, kind, *_ in line["missed"]}
        assert "cp.async wait" not in kinds, line
        if line["kernel"] == "_backward_kernel in Gluon":
            assert kinds <= {"barrier", "warp barrier", "wgmma fence"}, line
