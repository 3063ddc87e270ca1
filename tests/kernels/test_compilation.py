"""Every shipped kernel configuration, compiled for Hopper and Blackwell: spills and memory within their bounds.

``cd tests && python -m helpers.compiled_kernels 90 attention`` prints what is checked here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from motif_kernels.tuning import tables

TESTS = Path(__file__).resolve().parents[1]
SHARED_MEMORY = 227 * 1024  # bytes a block may use, on both
TENSOR_MEMORY = 512  # columns, on Blackwell


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("family", ["poly_norm", "combine", "attention", "decoding"])
def test_spills_and_memory_within_bounds(family: str, arch: int) -> None:
    pytest.importorskip("triton", reason="compiling needs triton")
    # A process of its own: here, kernels may be interpreted, which is decided when triton is imported.
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "helpers.compiled_kernels", "--json", str(arch), family]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) > 20
    assert not [k for k in kernels if k["stack"] > _stack_bound(k)]
    assert not [k for k in kernels if k["shared"] > SHARED_MEMORY]
    # More would still compile, but could not be launched.
    assert not [k for k in kernels if k["tensor_memory"] > TENSOR_MEMORY]


def _stack_bound(kernel: dict[str, Any]) -> int:
    """Bytes that a thread may spill: attention's kernels keep accumulators of the head's width in registers."""
    if kernel["kernel"] in ("attention_forward._forward_kernel", "decoding._split_kernel"):
        return 64
    if kernel["kernel"] in ("attention_backward._keys_kernel", "attention_backward._queries_kernel"):
        return 512
    return 0


def test_every_table_lists_sizes_in_order_and_ends_with_the_rest() -> None:
    assert tables()["default"]["gpu"] is None
    for table in tables().values():
        assert table["source"]
        for entries in table["kernels"].values():
            bounds = [e["up_to"] for e in entries]
            assert bounds[-1] is None
            assert bounds[:-1] == sorted(bounds[:-1])
