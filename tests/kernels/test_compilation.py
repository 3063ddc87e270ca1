"""Every shipped kernel configuration, compiled for Hopper and Blackwell: spills and memory within
their bounds.

``python -m benchmarks.compiled --families attention --architectures 90 --every`` prints what is
checked here.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.compiled import ARCHITECTURES, FAMILIES, compile_family, rows_of
from benchmarks.lib.report import RESULTS
from motif_kernels.tuning import tables

triton = pytest.importorskip("triton", reason="compiling needs triton")

SHARED_MEMORY = 227 * 1024  # bytes a block may use, on both
TENSOR_MEMORY = 512  # columns, on Blackwell


Kernels = list[dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, int], Kernels]:
    """Every family for every GPU, side by side; a second time Triton's own cache has them."""
    jobs = [(family, arch) for arch in reversed(ARCHITECTURES) for family in sorted(FAMILIES)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(jobs, pool.map(lambda job: compile_family(job[1], job[0]), jobs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_configuration_is_within_bounds_and_as_reported(
    compiled: dict[tuple[str, int], Kernels], family: str, arch: int
) -> None:
    kernels = compiled[family, arch]
    assert len(kernels) > 20
    assert_within_bounds(kernels)
    reported = json.loads((RESULTS / "compiled.json").read_text())
    if reported["environment"]["versions"]["triton"] == triton.__version__:
        message = "kernels have changed: python -m benchmarks.compiled writes the report anew"
        assert all(row in reported["kernels"] for row in rows_of(kernels)), message


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention_of_the_released_model_is_within_bounds(arch: int) -> None:
    kernels = compile_family(arch, "motif")
    assert len(kernels) >= 3
    assert_within_bounds(kernels)


def assert_within_bounds(kernels: Kernels) -> None:
    assert not [k for k in kernels if k["stack"] > _stack_bound(k)]
    assert not [k for k in kernels if k["shared"] > SHARED_MEMORY]
    # More would still compile, but could not be launched.
    assert not [k for k in kernels if k["tensor_memory"] > TENSOR_MEMORY]


def _stack_bound(kernel: dict[str, Any]) -> int:
    """Bytes that a thread may spill: attention keeps accumulators in registers while it walks."""
    return 1024 if kernel["kernel"].startswith(("attention_forward", "attention_backward", "decoding")) else 0


def test_every_table_lists_sizes_in_order_and_ends_with_the_rest() -> None:
    assert tables()["default"]["gpu"] is None
    for table in tables().values():
        assert table["source"]
        for entries in table["kernels"].values():
            bounds = [e["up_to"] for e in entries]
            assert bounds[-1] is None
            assert bounds[:-1] == sorted(bounds[:-1])
