"""Every shipped kernel configuration, compiled for Hopper and Blackwell: spills, memory and inner
loops within their bounds.

``python -m benchmarks.compiled --families attention --architectures 90 --every`` prints what is
checked here.
"""

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from benchmarks.compiled import ARCHITECTURES, FAMILIES, compile_family, jobs, rows_of
from benchmarks.lib import lints
from benchmarks.lib.report import RESULTS
from motif_kernels.tuning import tables

triton = pytest.importorskip("triton", reason="compiling needs triton")

ALL = jobs(ARCHITECTURES, FAMILIES)
# Whichever test comes first compiles all, some twelve minutes of two cores with an empty cache.
WHILE_COMPILING = pytest.mark.timeout(2400)

Kernels = list[dict[str, Any]]

# Of each loop in a row of the report.
INSTRUCTIONS = re.compile(r"(?<= \| )\d+(?=: )")


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[int, str], Kernels]:
    """Every family for every GPU, side by side; a second time Triton's own cache has them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(ALL, pool.map(lambda job: compile_family(*job), ALL), strict=True))


@WHILE_COMPILING
@pytest.mark.nightly
@pytest.mark.parametrize(("arch", "family"), ALL)
def test_every_configuration_is_within_bounds(compiled: dict[tuple[int, str], Kernels], arch: int, family: str) -> None:
    kernels = compiled[arch, family]
    assert len(kernels) >= 3
    assert_within_bounds(kernels)


@WHILE_COMPILING
@pytest.mark.nightly
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_are_as_reported(compiled: dict[tuple[int, str], Kernels], arch: int) -> None:
    """Of a GPU as a whole: kernels of several families share a row.

    ptxas is not repeatable: of the same PTX it makes one schedule or another, whose loops differ by
    some instructions. All else is equal.
    """
    reported = json.loads((RESULTS / "compiled.json").read_text())
    if reported["environment"]["versions"]["triton"] != triton.__version__:
        pytest.skip("the report is of another triton")
    found = rows_of(kernel for job in ALL if job[0] == arch for kernel in compiled[job])
    message = "kernels have changed: python -m benchmarks.compiled writes the report anew"
    expected = [row for row in reported["kernels"] if row["for"] == f"sm_{arch}"]
    before, now = json.dumps(expected), json.dumps(found)
    assert INSTRUCTIONS.sub("", now) == INSTRUCTIONS.sub("", before), message
    counts = [[int(n) for n in INSTRUCTIONS.findall(text)] for text in (now, before)]
    assert counts[0] == pytest.approx(counts[1], rel=0.02), message


@WHILE_COMPILING
@pytest.mark.nightly
def test_defects_that_are_mended_are_not_listed_as_known(compiled: dict[tuple[int, str], Kernels]) -> None:
    _, gone = lints.judge(kernel for kernels in compiled.values() for kernel in kernels)
    assert not gone


@pytest.mark.parametrize("arch", [90, 100])
def test_attention_of_the_released_model_is_within_bounds(arch: int) -> None:
    kernels = compile_family(arch, "motif")
    assert len(kernels) >= 3
    assert_within_bounds(kernels)


def assert_within_bounds(kernels: Kernels) -> None:
    new, _ = lints.judge(kernels)
    assert not new
    # Spills count where they are executed: those of an epilogue cost a few clocks a tile. Kernels
    # of rows are executed as a whole, once a row.
    of_rows = "poly_norm", "group_sums", "combine", "cache", "read_streams", "stream_maps", "update_streams"
    of_rows += "routing", "expert_rows"
    rows = [k for k in kernels if k["kernel"].startswith(tuple(f"triton.{name}" for name in of_rows))]
    assert not [k for k in rows if k["stack"]]
    decoding = [k for k in kernels if k["kernel"].startswith("triton.decoding")]
    assert not [k for k in decoding for loop in k["loops"] if loop["counts"].keys() & {"ldl", "stl"}]
    assert all(k["fp_fusion"] for k in kernels)  # asked for in every launch


def test_every_table_lists_sizes_in_order_and_ends_with_the_rest() -> None:
    assert tables()["default"]["gpu"] is None
    for table in tables().values():
        assert table["source"]
        for kernel, entries in table["kernels"].items():
            if entries is None:  # not for this GPU
                continue
            bounds = [e["up_to"] for e in entries]
            if kernel == "attention_backend":  # what was not measured is left to "auto"
                bounds += [None]
            assert bounds[-1] is None
            assert bounds[:-1] == sorted(bounds[:-1])


def test_blackwell_takes_none_of_hoppers_tiles() -> None:
    """What a table leaves out comes from the default, whose attention tiles are Hopper's."""
    listed = {name for name in tables()["default"]["kernels"] if name.startswith("attention_")}
    of_hopper = {name for name in listed if not name.endswith(("_float32", "_prepare"))}
    for gpu in ("nvidia_b200", "nvidia_b300"):
        assert of_hopper <= tables()[gpu]["kernels"].keys(), gpu
