"""The benchmarks of kernels: what they count, whom they refuse, how they judge, and a small run of
each.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import combine, kernels, poly_norm
from benchmarks.kernel_report import DIRECTIONS, judge, print_results
from benchmarks.kernels import CONTENDERS, TOLERANCES, device_slug, draw_from, errors_of, fault, measure
from benchmarks.memory import peak_bytes, saved_bytes
from benchmarks.timing import (
    Clock,
    CpuClock,
    CudaClock,
    Limits,
    Timing,
    Work,
    copy_bandwidth,
    matrix_rate,
    measure_limits,
    time_in_turns,
)

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def quick(benchmark: str, output: Path, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What a quick run printed, and its figures."""
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--quick", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(output.read_text())


def assert_complete(printed: str, content: dict[str, Any], contenders: set[str], picture: Path) -> None:
    assert content["complete"] is True
    assert content["refused"] == []
    assert content["copy"]["gb_per_second"] > 0
    assert {"torch", "triton", "liger-kernel"} <= content["environment"]["versions"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")
    cells: dict[tuple[str, str, int], set[str]] = {}
    for r in content["results"]:
        cells.setdefault((r["function"], r["dtype"], r["columns"]), set()).add(r["contender"])
        for direction in DIRECTIONS:
            seconds = r["seconds"][direction]
            assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]
            rate = r["bytes"][direction] / seconds["median"]
            assert r["gb_per_second"][direction] == pytest.approx(rate * 1e-9)
            assert r["copy_share"][direction] == pytest.approx(rate * 1e-9 / content["copy"]["gb_per_second"])
            floor = r["floor_seconds"][direction]
            assert floor["bytes"] == pytest.approx(r["bytes"][direction] * 1e-9 / content["copy"]["gb_per_second"])
            assert (floor["floor"], floor["operations"]) == (floor["bytes"], None)
            assert r["share_of_floor"][direction] == pytest.approx(r["copy_share"][direction])
        assert r["bytes"]["both"] == r["bytes"]["forward"] + r["bytes"]["backward"]
        assert r["repetitions"] >= 2
        for error in r["errors"].values():
            assert error["relative"] <= content["tolerances"][r["dtype"]]
        if r["contender"] == "ours":
            assert r["saved_bytes"]["beyond_inputs"] == 0
        assert r["saved_bytes"]["total"] >= r["saved_bytes"]["beyond_inputs"]
        assert r["peak_bytes"] > r["saved_bytes"]["total"]
    assert all(names == contenders for names in cells.values())
    for function, dtype, _ in cells:
        assert f"{function}, {dtype}, " in printed
    assert "floor, by bytes" in printed
    for name in contenders:
        assert CONTENDERS[name] in printed


def test_poly_norm_runs_with_every_contender_of_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "poly.json"
    printed, content = quick("poly_norm", path, "--functions", "mul_poly_norm", "--dtypes", "bf16")
    assert_complete(printed, content, {"eager", "compile", "ours"}, path.with_suffix(".png"))
    assert content["left_out"] == {"liger": "liger-kernel has no CPU path"}
    (ours,) = (r for r in content["results"] if r["contender"] == "ours")
    assert ours["errors"].keys() == {"output", "gate", "up", "weight", "bias"}
    # Their own intermediates are what eager keeps, and ours does not.
    (eager,) = (r for r in content["results"] if r["contender"] == "eager")
    assert eager["saved_bytes"]["beyond_inputs"] > 0
    assert eager["peak_bytes"] > ours["saved_bytes"]["total"]


def test_combine_runs_every_layout(tmp_path: Path) -> None:
    path = tmp_path / "combine.json"
    printed, content = quick("combine", path, "--contenders", "eager", "ours", "--dtypes", "bf16")
    assert_complete(printed, content, {"eager", "ours"}, path.with_suffix(".png"))
    assert {(r["function"], r["columns"]) for r in content["results"]} == {
        ("GDA 4:1, no epilogue", 1024),
        ("GDA 4:1, sub-norm", 1024),
        ("GDA 4:1, gate", 1024),
        ("DIFF V1, sub-norm", 128),
        ("DIFF V2, no epilogue", 128),
    }
    gated = next(r for r in content["results"] if r["function"] == "GDA 4:1, gate")
    assert gated["errors"].keys() == {"output", "signal", "noise", "lambda", "gate"}


@pytest.mark.parametrize(
    ("function", "dtype", "forward", "backward"),
    [
        ("poly_norm", "bf16", 4, 6),
        ("mul_poly_norm", "bf16", 6, 10),
        ("poly_norm", "float32", 8, 12),
        ("mul_poly_norm", "float32", 12, 20),
    ],
)
def test_bytes_an_element_of_poly_norm(function: str, dtype: str, forward: int, backward: int) -> None:
    moved = poly_norm.problem(function, dtype, 16, 64).bytes_moved()
    assert {d: size / (16 * 64) for d, size in moved.items()} == {
        "forward": forward,
        "backward": backward,
        "both": forward + backward,
    }


@pytest.mark.parametrize(
    ("layout", "epilogue", "forward", "backward"),
    [
        # Units of a signal-sized tensor; GDA's noise is a quarter of one.
        ("gda", "none", 2 + 1 / 4, 2 + 2 / 4),
        ("gda", "sub-norm", 2 + 1 / 4, 3 + 2 / 4),
        ("gda", "gate", 3 + 1 / 4, 5 + 2 / 4),
        ("diff_v1", "sub-norm", 3, 5),
        # lambda: four bytes for each head of 128 elements of two bytes.
        ("diff_v2", "none", 3 + 4 / 256, 4 + 8 / 256),
        ("diff_v2", "gate", 4 + 4 / 256, 7 + 8 / 256),
    ],
)
def test_bytes_of_the_epilogues(layout: str, epilogue: str, forward: float, backward: float) -> None:
    moved = combine.problem(combine.LAYOUTS[layout], epilogue, "bf16", 16, 4096).bytes_moved()
    signal = 16 * 4096 * 2
    assert (moved["forward"] / signal, moved["backward"] / signal) == (forward, backward)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("epilogue", combine.EPILOGUES)
@pytest.mark.parametrize("layout", combine.LAYOUTS.values(), ids=lambda layout: layout.label)
def test_what_is_counted_is_what_exists(layout: combine.Layout, epilogue: str, dtype: str) -> None:
    # All inputs are read once forward and the output is written, but for vectors of a head's width
    # or less.
    problem = combine.problem(layout, epilogue, dtype, 2, 1024)
    inputs = problem.make(draw_from(0, kernels.DTYPES[dtype], CPU))
    size = sum(t.nbytes for t in inputs.values() if t.ndim > 1) + inputs["signal"].nbytes
    assert problem.forward_bytes == size


def wrong_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm.plain_poly_norm(x, weight.flip(0), bias)


def wrong_backward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm.plain_poly_norm(x, weight.detach() + 0 * weight, bias)


def not_finite(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm.plain_poly_norm(x, weight, bias) / 0


def broken(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    raise RuntimeError("out of registers\nand more lines")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (wrong_forward, "its output is off by"),
        (wrong_backward, "its gradient of weight is off by"),
        (not_finite, "its output is off by"),
        (broken, "it failed with RuntimeError: out of registers"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_contender_that_is_wrong_is_refused_by_name(function: Any, reason: str, dtype: str) -> None:
    problem = dataclasses.replace(poly_norm.problem("poly_norm", dtype, 16, 64), ours=function)
    results, refused = measure(problem, ["eager", "ours"], CPU, CpuClock(), seconds=0, minimum=1)
    assert [r["contender"] for r in results] == ["eager"]
    (refusal,) = refused
    assert refusal["contender"] == "ours"
    assert refusal["reason"].startswith(reason)
    assert "\n" not in refusal["reason"]


def test_a_refusal_is_printed_and_is_an_error_where_it_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(poly_norm, "_ours", wrong_forward)
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--contenders", "eager", "ours", "--dtypes", "float32"]
    assert poly_norm.main([*arguments, "--functions", "poly_norm", "--output", str(path)]) == 1
    content = json.loads(path.read_text())
    assert [r["contender"] for r in content["results"]] == ["eager"]
    assert [r["contender"] for r in content["refused"]] == ["ours"]
    assert "refused motif_kernels at poly_norm, float32, 16 x 256: its output is off by" in capsys.readouterr().out


def test_a_run_that_is_stopped_reports_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop_at_the_product(*_: Any, **__: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr(poly_norm, "_ours_mul", stop_at_the_product)
    path = tmp_path / "figures.json"
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--contenders", "eager", "ours", "--dtypes", "float32"]
    before = signal.getsignal(signal.SIGTERM)
    assert poly_norm.main([*arguments, "--output", str(path)]) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert [(r["function"], r["contender"]) for r in content["results"]] == [
        ("poly_norm", c) for c in ("eager", "ours")
    ]
    assert path.with_suffix(".png").exists()
    printed = capsys.readouterr().out
    assert "stopped" in printed
    assert "poly_norm, float32, 16 rows: time" in printed


def test_a_single_wrong_element_is_found() -> None:
    inputs = {"x": torch.randn(64, 512, requires_grad=True)}
    grad = torch.randn(64, 512)
    out = inputs["x"].detach() * 2
    results = {"right": [out, grad * 2], "wrong": [out.clone(), grad * 2], "lost": [out, grad.clone() * 2]}
    results["wrong"][0][63, 511] += 0.5
    results["lost"][1][0, 0] = float("nan")
    errors = errors_of(lambda x: x * 2, inputs, grad, results)
    assert errors["right"]["output"] == {"largest": 0.0, "relative": 0.0}
    assert fault(errors["right"], TOLERANCES["bf16"]) is None
    assert errors["wrong"]["output"]["largest"] == pytest.approx(0.5, rel=1e-5)
    assert fault(errors["wrong"], TOLERANCES["bf16"])
    assert "gradient of x is off by nan" in (fault(errors["lost"], TOLERANCES["bf16"]) or "")


def test_errors_are_the_same_in_blocks_of_rows() -> None:
    # More elements than a block holds: parameters' gradients are summed over blocks.
    rows, columns = 9, 1 << 19
    inputs = {"x": torch.randn(rows, columns, requires_grad=True), "scale": torch.tensor(2.0, requires_grad=True)}
    grad = torch.randn(rows, columns)
    out = inputs["x"] * inputs["scale"]
    exact = (grad.double() * inputs["x"].detach().double()).sum()
    found = [out.detach(), grad * 2, exact.float()]
    errors = errors_of(lambda x, scale: x * scale, inputs, grad, {"it": found})["it"]
    assert errors["output"]["largest"] == 0
    assert errors["x"]["largest"] == 0
    assert errors["scale"]["relative"] < 1e-6


class Overwriting(torch.autograd.Function):
    """Doubles, and writes its gradient over the incoming one, as liger-kernel's PolyNorm does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.mul_(2)


def test_a_contender_that_overwrites_its_gradient_gets_it_back_each_time() -> None:
    x, grad = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    given = grad.clone()
    contender = kernels.Contender(Overwriting.apply, [x], grad, overwrites=True)
    works = contender.works()
    for name in ("backward", "both", "backward"):
        found = works[name].call(works[name].prepare())
        torch.testing.assert_close(found[-1], 2 * given)  # type: ignore[index]
    assert torch.equal(grad, given)


class TurnClock(Clock):
    """Runs the work, and counts seconds by itself."""

    def time(self, work: Work) -> Timing:
        work.call(work.prepare())
        return Timing(1.0, 0.5)


def test_contenders_take_turns_in_an_order_that_rotates() -> None:
    turns = ""

    def note(name: str) -> Work:
        def call(given: object) -> None:
            nonlocal turns
            turns += name + str(given)

        return Work(call, prepare=lambda: len(turns) // 2 % 2)

    works = {name: {"it": note(name)} for name in "abc"}
    timings = time_in_turns(works, TurnClock(), seconds=0, minimum=3, warmup=1)
    assert turns[::2] == "cab" + "abc" + "bca" + "cab"
    assert set(turns[1::2]) == {"0", "1"}
    assert {name: len(of["it"]) for name, of in timings.items()} == {"a": 3, "b": 3, "c": 3}


def test_timing_ends_at_the_most_repetitions() -> None:
    timings = time_in_turns({"a": {"it": Work(lambda _: None)}}, TurnClock(), seconds=60, maximum=4)
    assert timings["a"]["it"] == [Timing(1.0, 0.5)] * 4


def test_limits_are_what_the_clock_says() -> None:
    assert copy_bandwidth(CPU, TurnClock(), bytes_=1000, seconds=0) == 2000  # read and written in a second
    assert matrix_rate(CPU, TurnClock(), torch.bfloat16, size=16, seconds=0) == 2 * 16**3
    limits = measure_limits(CPU, TurnClock(), {"bf16": torch.bfloat16}, seconds=0, quick=True)
    assert limits.content() == {
        "copy": {"bytes": 4 << 20, "gb_per_second": (8 << 20) * 1e-9},
        "matrix": {"size": 128, "tflops": {"bf16": 2 * 128**3 * 1e-12}},
    }
    assert "matrix" not in measure_limits(CPU, TurnClock(), {}, seconds=0, quick=True).content()


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    limits = Limits(1, 100.0, 1, {"bf16": 1000.0, "float32": 10.0})
    assert limits.floor(50, 200, "bf16")._asdict() == {"bytes": 0.5, "operations": 0.2, "floor": 0.5}
    assert limits.floor(50, 200, "float32")._asdict() == {"bytes": 0.5, "operations": 20.0, "floor": 20.0}
    assert limits.floor(50)._asdict() == {"bytes": 0.5, "operations": None, "floor": 0.5}


class FakeEvent:
    """An event of a GPU that waits for as long as it was told to sleep."""

    slept = 0.0
    host_needs = 1e-3

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return FakeEvent.slept < FakeEvent.host_needs

    def elapsed_time(self, end: FakeEvent) -> float:
        return 2.0  # milliseconds


def test_a_gpu_waits_until_its_work_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(cycles: int) -> None:
        FakeEvent.slept = cycles / 2e9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    prepared, called = [], []
    work = Work(lambda given: called.append(given), prepare=lambda: prepared.append(0) or len(prepared))
    clock = CudaClock(CPU)
    assert clock.time(work).seconds == 2e-3
    # The first leads were too short: each try was prepared anew, and the last one's lead is kept.
    assert called == list(range(1, len(prepared) + 1))
    assert len(called) > 1
    assert FakeEvent.slept >= FakeEvent.host_needs
    tries = len(called)
    clock.time(work)
    assert len(called) == tries + 1
    # A call that waits for the GPU by itself is never ahead; it is timed all the same.
    monkeypatch.setattr(FakeEvent, "host_needs", 1e9)
    assert clock.time(work).seconds == 2e-3


def test_saved_bytes_are_counted_by_storage() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == {"total": 400, "beyond_inputs": 0}
    assert saved_bytes(lambda: x.view(10, 10)[0].square(), [x]) == {"total": 400, "beyond_inputs": 0}
    assert saved_bytes(lambda: x.exp() * x, [x]) == {"total": 800, "beyond_inputs": 400}
    assert saved_bytes(lambda: x + x, [x]) == {"total": 0, "beyond_inputs": 0}


def test_peak_bytes_are_what_is_held_at_once() -> None:
    x = torch.zeros(1 << 18)  # 1 MiB; each operation gives another

    def two_at_a_time() -> Tensor:
        out = x + 1
        for _ in range(5):
            out = out + 1
        return out

    assert peak_bytes(two_at_a_time, CPU) == pytest.approx(2 << 20, rel=0.01)
    assert peak_bytes(lambda: [x + 1 for _ in range(5)], CPU) == pytest.approx(5 << 20, rel=0.01)


def result(
    contender: str, columns: int, forward: float, backward: float, *, dtype: str = "bf16", rows: int = 8192
) -> dict[str, Any]:
    """Made-up times; ours moves a byte in a second at the copy's bandwidth."""
    seconds = {"forward": forward, "backward": backward, "both": forward + backward}
    return {
        "function": "poly_norm",
        "dtype": dtype,
        "rows": rows,
        "columns": columns,
        "contender": contender,
        "seconds": {d: {"median": s, "lower": s, "upper": s} for d, s in seconds.items()},
        "gb_per_second": {d: 1 / s for d, s in seconds.items()},
        "copy_share": {d: 1 / s for d, s in seconds.items()},
        "floor_seconds": {d: {"bytes": 0.5, "operations": None, "floor": 0.5} for d in seconds},
        "share_of_floor": {d: 0.5 / s for d, s in seconds.items()},
        "saved_bytes": {"total": 1, "beyond_inputs": 0},
        "peak_bytes": {"eager": 10, "ours": 5}.get(contender, 7),
    }


def test_a_gpu_is_judged_by_the_worst_size() -> None:
    judged = judge(
        [
            # Too short for the aims that speak of large rows, but liger must be behind here as
            # well.
            result("ours", 2048, 2.0, 2.0),
            result("compile", 2048, 2.0, 2.0),
            result("liger", 2048, 2.0, 2.1),
            result("ours", 4096, 1.0, 1.2),
            result("compile", 4096, 1.3, 4.8),
            result("liger", 4096, 3.0, 3.0),
            result("ours", 8192, 1.25, 1.3),
            result("compile", 8192, 2.5, 3.9),
            # Other dtypes and fewer rows are not what the aims speak of.
            result("ours", 4096, 9.0, 9.0, dtype="float32"),
            result("ours", 4096, 9.0, 9.0, rows=4096),
            result("compile", 4096, 9.0, 9.0, rows=4096),
        ],
        CUDA,
    )
    found = {
        (j["measure"], j["bound"], j["direction"]): (j["worst"], j["worst_at"]["columns"], j["met"]) for j in judged
    }
    approx = pytest.approx
    assert found == {
        ("copy_share", 0.8, "forward"): (approx(0.8), 8192, True),
        ("copy_share", 0.8, "backward"): (approx(1 / 1.3), 8192, False),
        ("speed", 1.3, "forward"): (approx(1.3), 4096, True),
        ("speed", 3.0, "backward"): (approx(3.0), 8192, True),
        ("speed", 1.0, "forward"): (approx(1.0), 2048, False),
        ("speed", 1.0, "backward"): (approx(1.05), 2048, True),
        ("speed", 1.0, "both"): (approx(4.1 / 4.0), 2048, True),
    }


def test_a_cpu_is_judged_by_peak_memory_in_float32() -> None:
    cells = [
        result(name, columns, 1.0, 1.0, dtype="float32", rows=2048)
        for name in ("eager", "ours")
        for columns in (2048, 8192)
    ]
    (aim,) = judge(cells, CPU)
    assert (aim["worst"], aim["met"], aim["worst_at"]) == (0.5, True, {"rows": 2048, "columns": 8192})
    cells[-1]["peak_bytes"] = 6
    assert not judge(cells, CPU)[0]["met"]
    assert judge(cells[:-1], CPU) == []
    assert judge([cell | {"function": "GDA 4:1, gate"} for cell in cells], CPU) == []


def test_aims_and_refusals_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    results = [result("ours", 4096, 1.0, 2.0), result("compile", 4096, 1.5, 1.5)]
    content = {
        "environment": {"device": "NVIDIA H100"},
        "copy": {"gb_per_second": 3000.0},
        "results": results,
        "refused": [{**result("liger", 4096, 1.0, 1.0), "reason": "its output is off by 3"}],
        "aims": judge(results, CUDA),
    }
    print_results(Console(width=100), content, CONTENDERS)
    printed = capsys.readouterr().out
    assert re.search(r"4,096 +floor, by bytes +500,000\.0 +500,000\.0 +500,000\.0", printed)  # microseconds
    assert "refused liger-kernel at poly_norm, bf16, 8,192 x 4,096: its output is off by 3" in printed
    assert (
        "not met  poly_norm, bf16, backward: at least 80% of copy bandwidth: 0.50 at worst (8,192 x 4,096)" in printed
    )
    assert "met      poly_norm, bf16, forward: at least 1.3 times torch.compile: 1.50 at worst" in printed


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100"),
        ("NVIDIA H200", "nvidia_h200"),
        ("NVIDIA A100-SXM4-40GB", "nvidia_a100_sxm4"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090"),
    ],
)
def test_files_are_named_for_the_device(name: str, slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert device_slug(CUDA) == slug
    assert device_slug(CPU) == "cpu"


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (poly_norm.main, ["--rows", "-1"], "--rows is -1; it must be above 0"),
        (poly_norm.main, ["--columns", "64", "0"], "--columns is 0; it must be above 0"),
        (poly_norm.main, ["--contenders", "liger"], "--contenders liger: liger-kernel has no CPU path"),
        (combine.main, ["--columns", "1000"], "--columns 1000 is not a whole number of groups of GDA 4:1's heads"),
    ],
)
def test_impossible_arguments_end_in_one_message(
    main: Any, arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "figures.json")]
    assert main([*arguments, *output, "--device", "cpu", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
