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


# Attention kernels that still spill in an inner loop, with the reason; to be removed.
SPILLING = {
    "triton.attention_forward._forward_kernel": "accumulators of 64 x 256 beside pointers",
    "triton.attention_backward._keys_kernel": "three accumulators and the maps of both heads",
    "triton.attention_backward._queries_kernel": "accumulators of 64 x 256 beside pointers",
    "triton.decoding._split_kernel": "accumulators of 16 x 512",
}

Kernels = list[dict[str, Any]]


def spills(loop: dict[str, Any]) -> int:
    """Accesses to local memory in an iteration."""
    return loop["counts"].get("ldl", 0) + loop["counts"].get("stl", 0)


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
    # Spills count where they are executed: those of an epilogue cost a few clocks a tile.
    spilled = [k for k in kernels for loop in k["loops"] if k["kernel"] not in SPILLING and spills(loop)]
    assert not spilled
    assert not [k for k in kernels if k["shared"] > SHARED_MEMORY]
    # More would still compile, but could not be launched.
    assert not [k for k in kernels if k["tensor_memory"] > TENSOR_MEMORY]


def test_every_table_lists_sizes_in_order_and_ends_with_the_rest() -> None:
    assert tables()["default"]["gpu"] is None
    for table in tables().values():
        assert table["source"]
        for entries in table["kernels"].values():
            bounds = [e["up_to"] for e in entries]
            assert bounds[-1] is None
            assert bounds[:-1] == sorted(bounds[:-1])
