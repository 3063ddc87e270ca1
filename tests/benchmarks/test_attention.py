"""The attention benchmark: how it counts work, whom it refuses, how it judges, and a small run."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import attention, attention_contenders
from benchmarks.attention_check import Exact
from benchmarks.attention_contenders import (
    Candidate,
    backend,
    candidates,
    compose,
    flex,
    refusal,
    unavailable,
    varlen,
)
from benchmarks.attention_problems import LAYOUTS, Problem, mix_documents, problem
from benchmarks.attention_report import judge, mark_best, print_results
from benchmarks.kernel_report import DIRECTIONS
from benchmarks.kernels import DTYPES, Contender, draw_from
from benchmarks.timing import Clock, CpuClock, Limits, Timing, Work

ROOT = Path(__file__).parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LIMITS = Limits(1, 1e9, 1, dict.fromkeys(DTYPES, 1e12))
MASKS = ["v1_64", "v1_64_w128", "v1_64_packed", "gda4_64", "gda4_128_w128", "gda4_128_packed", "v2_64"]


def small(name: str, dtype: str = "float32", length: int = 150) -> Problem:
    """A layout at a length that no block divides, with the fewest heads that there can be."""
    return problem(name, dtype, length, tokens=2 * length, head_divisor=64)


def inputs_of(p: Problem) -> dict[str, Tensor]:
    inputs = p.make(draw_from(0, DTYPES[p.dtype], CPU))
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


def test_a_quick_run_measures_what_runs_on_a_cpu(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "attention.json"
    command = [sys.executable, "-m", "benchmarks.attention", "--quick", "--device", "cpu", "--dtypes", "bf16"]
    done = subprocess.run(
        [*command, "--threads", "1", "--output", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(path.read_text())
    assert content["complete"] is True
    assert content["refused"] == content["not_begun"] == content["aims"] == []
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {"triton", "triton_fast", "flash"} <= content["left_out"].keys()
    found: dict[str, set[str]] = {}
    for r in content["results"]:
        found.setdefault(r["layout"], set()).add(r["contender"])
        layout = content["layouts"][r["layout"]]
        assert f"{layout['label']}, bf16, 320 tokens: time" in done.stdout
        assert r["best"] is True  # a CPU has one kernel for each contender
        assert r["repetitions"] >= 2
        assert r["flops"]["both"] == r["flops"]["forward"] + r["flops"]["backward"]
        directions = ("forward",) if r["contender"] == "flex" else DIRECTIONS
        assert r["seconds"].keys() == r["tflops"].keys() == r["share_of_floor"].keys() == set(directions)
        for d in directions:
            seconds = r["seconds"][d]
            assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]
            assert r["tflops"][d] == pytest.approx(r["flops"][d] / seconds["median"] * 1e-12)
            floor = r["floor_seconds"][d]
            assert floor["bytes"] == pytest.approx(r["bytes"][d] * 1e-9 / content["copy"]["gb_per_second"])
            assert floor["operations"] == pytest.approx(r["flops"][d] * 1e-12 / content["matrix"]["tflops"]["bf16"])
            assert floor["floor"] == max(floor["bytes"], floor["operations"])
            assert r["share_of_floor"][d] == pytest.approx(floor["floor"] / seconds["median"])
        gradients = {"q1", "k1", "q2", "v", "lambda"} | (set() if layout["shared_keys"] else {"k2", "norm_weight"})
        if r["contender"] == "flex":
            assert (r["peak_bytes"], r["errors"].keys()) == (None, {"output"})
        else:
            assert r["peak_bytes"] > 0
            assert r["errors"].keys() == gradients | {"output"}
        assert all(e["relative"] <= content["tolerances"]["bf16"] for e in r["errors"].values())
    assert "floor, by " in done.stdout
    compositions = {"sdpa", "two", "four", "naive"}
    assert found == {
        "v1_64": compositions | {"flex"},
        "gda4_128_w128": compositions,
        "v2_64": compositions - {"four"},
        "v1_64_packed": compositions,
    }
    assert sum(content["documents"]["v1_64_packed 160"]) == 320
    skipped = {(s["layout"], s["contender"]): s["reason"] for s in content["skipped"]}
    assert "nothing to split" in skipped["v2_64", "four"]
    assert "compiles for long" in skipped["v2_64", "flex"]


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [("v1_64", 12, 20), ("v1_128", 12, 20), ("gda4_128", 30, 62), ("gda2_64", 18, 34), ("v2_64", 8, 16)],
)
def test_work_for_a_pair_in_units_of_the_width(name: str, forward: int, backward: int) -> None:
    layout = LAYOUTS[name]
    counted = {d: flops / layout.width for d, flops in layout.flops_per_pair().items()}
    assert counted == {"forward": forward, "backward": backward, "both": forward + backward}


@pytest.mark.parametrize("name", MASKS)
def test_bytes_are_those_of_every_tensor_once(name: str) -> None:
    """Vectors of a head's width or less are left out, as in the other benchmarks."""
    p = small(name, "bf16")
    inputs = {n: t for n, t in inputs_of(p).items() if t.ndim > 1}
    out = backend(p, "naive", CPU)(inputs_of(p))
    given = sum(t.nbytes for t in inputs.values())
    moved = p.bytes_moved()
    assert moved["forward"] == given + out.nbytes
    # Inputs, output and its gradient are read, a gradient of each input is written.
    assert moved["backward"] == 2 * given + 2 * out.nbytes
    assert moved["both"] == moved["forward"] + moved["backward"]


@pytest.mark.parametrize("name", MASKS)
def test_only_visible_pairs_are_counted(name: str) -> None:
    p = small(name)
    row, window = range(p.rows), p.layout.window or p.rows
    starts = [max(b for b in p.bounds if b <= i) if p.documents else 0 for i in row]
    visible = [[starts[i] <= k <= i and i - k < window for k in row] for i in row]
    assert p.pairs == p.batch * sum(map(sum, visible))
    assert p.flops()["forward"] == p.pairs * p.noise_heads * p.layout.flops_per_pair()["forward"]


def test_sizes_of_the_layouts() -> None:
    assert problem("v1_64", "bf16", 4096, tokens=16384).batch == 4
    assert problem("v1_64", "bf16", 32768, tokens=16384).batch == 1
    # Motif-2-12.7B has 32 signal and 8 noise heads over 8 of each of its keys and its values.
    heads = problem("gda4_128", "bf16", 512, tokens=512).heads
    assert heads == {"q1": 32, "k1": 8, "q2": 8, "k2": 8, "v": 8, "lambda": 32, "output": 32}
    eighth = problem("v2_128", "bf16", 512, tokens=512, head_divisor=8)
    assert (eighth.heads["q1"], eighth.heads["v"]) == (2, 1)
    assert "k2" not in inputs_of(small("v2_64"))


def test_documents_are_a_fixed_mixture() -> None:
    documents = mix_documents(16384, 4096)
    assert documents == mix_documents(16384, 4096)
    assert sum(documents) == 16384
    assert max(documents) == 4096
    assert sum(length < 512 for length in documents) >= 5
    assert mix_documents(100, 200) == (100,)


@pytest.mark.parametrize("name", MASKS)
def test_every_contender_of_a_cpu_is_right(name: str) -> None:
    p = small(name)
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    names = ["sdpa", "two", "naive"] + ["four"] * (refusal(p, "four", CPU) is None)
    for candidate in candidates(p, names, CPU):
        checked = attention.check(candidate, inputs, exact, exact.grad, tolerance=1e-4)
        assert isinstance(checked, attention.Checked), (candidate.contender, checked)
        assert checked.errors.keys() == {"output", *inputs}


def test_inputs_are_widened_and_repeated_where_a_kernel_asks_for_it() -> None:
    p = small("gda4_64")
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    (two,) = candidates(p, ["two"], CPU)
    right = []
    for form in two.forms:
        checked = attention.check(Candidate("two", "flash", [form]), inputs, exact, exact.grad, tolerance=1e-4)
        if isinstance(checked, attention.Checked):
            right.append(checked.form)
        else:
            assert "No available kernel" in checked  # a CPU's flash attention has one width for all
    assert right == ["padded", "padded, repeated"]
    # On a GPU two kernels are tried; halves of the values are as wide as the keys, and need no
    # padding.
    found = {(c.contender, c.variant): [name for name, _ in c.forms] for c in candidates(p, ["two", "four"], CUDA)}
    assert found == {
        ("two", "cuDNN"): ["", "repeated", "padded", "padded, repeated"],
        ("two", "flash"): ["", "repeated", "padded", "padded, repeated"],
        ("four", "cuDNN"): ["", "repeated"],
        ("four", "flash"): ["", "repeated"],
    }


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["v1_64_w128", "gda4_64", "gda4_128_packed", "v2_64"])
def test_flex_attention_has_the_layouts_masks(name: str) -> None:
    p = small(name)
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    function = compose(flex(p, CPU, lambda function, dynamic: function), 2)
    with torch.no_grad():  # it has no backward on a CPU
        out = function({name: tensor.detach() for name, tensor in inputs.items()})
    assert exact.errors({"output": out})["output"]["relative"] < 1e-4


@pytest.mark.parametrize("option", [True, False], ids=["with enable_gqa", "without it, as some torch"])
@pytest.mark.parametrize("name", ["v1_64_w128", "gda4_128_packed"])
def test_varlen_is_given_every_sequence_and_window(name: str, option: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU; in its place stands the naive formula with the same arguments."""
    from torch.nn.attention import varlen as library

    from motif_kernels.reference import attention as naive
    from motif_kernels.reference import packed_attention_mask

    def old(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bounds_q: Tensor,
        bounds_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
    ) -> Tensor:
        visible = packed_attention_mask(bounds_q, bounds_k, len(q), len(k), causal=False, window_size=window_size)
        return naive(q[None], k[None], v[None], mask=visible, softmax_scale=scale)[0][0]

    def new(q: Tensor, k: Tensor, *rest: Any, enable_gqa: bool, **options: Any) -> Tensor:
        assert enable_gqa == (q.shape[1] != k.shape[1])
        return old(q, k, *rest, **options)

    monkeypatch.setattr(library, "varlen_attn", new if option else old)
    p = small(name)
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    candidate = Candidate("four", "flash", [("", compose(varlen(p, CPU), 4))])
    checked = attention.check(candidate, inputs, exact, exact.grad, tolerance=1e-4)
    assert isinstance(checked, attention.Checked), checked


def wrong_lambda(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return t | {"lambda": 1.1 * t["lambda"]}


def later_keys(t: dict[str, Tensor]) -> dict[str, Tensor]:
    return t | {"k1": t["k1"].roll(1, dims=1)}


def detached(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Right forward, and a gradient of v that lacks the half."""
    return t | {"v": 0.5 * t["v"] + 0.5 * t["v"].detach()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [(wrong_lambda, "its output is off"), (later_keys, "its output is off"), (detached, "its gradient of v is off")],
)
def test_a_wrong_contender_is_refused_by_name_and_the_others_are_timed(
    change: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = small("gda4_64", "bf16")
    right = backend(p, "sdpa", CPU)

    def wrong(t: Any) -> Tensor:
        return right(change(dict(t)))

    both = [Candidate("two", "flash", [("", wrong)]), Candidate("sdpa", "", [("", right)])]
    monkeypatch.setattr(attention, "candidates", lambda *_: both)
    results, refused = attention.measure(p, ["two", "sdpa"], CPU, CpuClock(), seconds=0, minimum=2, limits=LIMITS)
    assert [r["contender"] for r in results] == ["sdpa"]
    (refusal_,) = refused
    assert (refusal_["contender"], refusal_["layout"]) == ("two", "gda4_64")
    assert reason in refusal_["reason"]


@pytest.mark.parametrize("place", ["output", "k2", "lambda"])
@pytest.mark.parametrize("value", [10.0, float("nan")])
def test_a_single_wrong_element_is_found(place: str, value: float) -> None:
    p = small("v2_64")
    p = dataclasses.replace(p, layout=dataclasses.replace(p.layout, shared_keys=False)) if place == "k2" else p
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    function = backend(p, "naive", CPU)

    def of_tensors(*tensors: Tensor) -> Tensor:
        return function(dict(zip(inputs, tensors, strict=True)))

    results = Contender(of_tensors, list(inputs.values()), exact.grad, overwrites=False).both()
    found = {name: t.detach().clone() for name, t in zip(("output", *inputs), results, strict=True)}
    assert max(e["relative"] for e in exact.errors(found).values()) < 1e-4
    found[place][(-1,) * found[place].ndim] += value
    errors = {name: e["relative"] for name, e in exact.errors(found).items()}
    assert not errors.pop(place) <= 0.15
    assert max(errors.values()) < 1e-4


def test_rubbish_between_the_slices_is_found() -> None:
    # Three sequences: the one in the middle got no incoming gradient.
    p = problem("v1_64", "float32", 20, tokens=60, head_divisor=64)
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))
    assert exact.grad[1].abs().max() == 0
    gradient = torch.zeros_like(inputs["k1"])
    for index, t in zip(exact.indices["k1"], exact.exact["k1"], strict=True):
        gradient[index] = t.float()
    assert exact.errors({"k1": gradient})["k1"]["relative"] < 1e-6
    gradient[1, 3, 0, 5] = 1.0
    assert exact.errors({"k1": gradient})["k1"]["relative"] > 0.15
    # The output is held to exact numbers on the slices, and elsewhere to being a number.
    out = torch.zeros_like(exact.grad)
    for index, t in zip(exact.indices["output"], exact.exact["output"], strict=True):
        out[index] = t.float()
    assert exact.errors({"output": out})["output"]["relative"] < 1e-6
    out[1, 0, 0, 0] = float("inf")
    assert exact.errors({"output": out})["output"]["relative"] == float("inf")


def test_the_first_form_that_runs_is_taken() -> None:
    p = small("v1_64")
    inputs = inputs_of(p)
    exact = Exact(p, inputs, draw_from(1, torch.float32, CPU))

    def unsupported(_: Any) -> Tensor:
        raise RuntimeError("No available kernel.\nAborting.")

    forms = [("", unsupported), ("padded", backend(p, "naive", CPU)), ("never tried", unsupported)]
    checked = attention.check(Candidate("two", "flash", forms), inputs, exact, exact.grad, 1e-4)
    assert isinstance(checked, attention.Checked)
    assert checked.names() == {"contender": "two", "variant": "flash", "form": "padded"}
    reason = attention.check(Candidate("two", "flash", forms[:1]), inputs, exact, exact.grad, 1e-4)
    assert reason == "it failed with RuntimeError: No available kernel."


class TurnClock(Clock):
    """Runs the work, and counts seconds by itself."""

    def time(self, work: Work) -> Timing:
        work.call(work.prepare())
        return Timing(1.0, 0.5)


@pytest.mark.parametrize("late", [False, True], ids=["in the check", "in the timing"])
def test_one_that_runs_out_of_memory_is_reported_and_the_others_go_on(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = small("v1_64")
    right, calls = backend(p, "naive", CPU), 0

    def hungry(t: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > (3 if late else 0):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return right(t)

    both = [Candidate("naive", "", [("", hungry)]), Candidate("sdpa", "", [("", right)])]
    monkeypatch.setattr(attention, "candidates", lambda *_: both)
    results, refused = attention.measure(p, [], CPU, TurnClock(), seconds=0, minimum=4, limits=LIMITS)
    assert [(r["contender"], r["repetitions"]) for r in results] == [("sdpa", 4)]
    assert [(r["contender"], r["reason"]) for r in refused] == [("naive", "it ran out of memory")]


def test_the_naive_formula_is_not_tried_where_its_maps_do_not_fit() -> None:
    assert refusal(problem("v1_64", "bf16", 512, tokens=512, head_divisor=8), "naive", CPU) is None
    reason = refusal(problem("v1_64", "bf16", 16384, tokens=16384), "naive", CPU)
    assert reason == "its maps would take about 256 GiB"


def test_without_flash_attn_its_backend_is_left_out_and_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal of one of ours is a failure of the run."""
    monkeypatch.setattr(attention_contenders.flash, "installed", lambda: None)
    assert unavailable(CUDA) == {"flash": "flash-attn is not installed"}
    monkeypatch.setattr(attention_contenders.flash, "installed", lambda: 3)
    assert unavailable(CUDA) == {}
    monkeypatch.setattr(
        attention_contenders.flash,
        "refusal",
        lambda *, device, dtype, head_dim, value_dim: "too wide" if value_dim == 256 else None,
    )
    assert refusal(problem("gda4_128", "bf16", 512, tokens=512), "flash", CUDA) == "too wide"
    assert refusal(problem("v1_64", "bf16", 512, tokens=512), "flash", CUDA) is None


def result(
    layout: str, length: int, contender: str, both: float, *, peak: int = 10, variant: str = "", dtype: str = "bf16"
) -> dict[str, Any]:
    """Made-up figures."""
    names = {"layout": layout, "dtype": dtype, "length": length, "batch": 1, "tokens": length}
    return names | {
        "contender": contender,
        "variant": variant,
        "form": "",
        "seconds": {d: {"median": both, "lower": both, "upper": both} for d in DIRECTIONS},
        "tflops": dict.fromkeys(DIRECTIONS, 1 / both),
        "floor_seconds": {d: {"bytes": 0.2, "operations": 0.5, "floor": 0.5} for d in DIRECTIONS},
        "share_of_floor": dict.fromkeys(DIRECTIONS, 0.5 / both),
        "peak_bytes": peak,
        "best": True,
    }


def test_the_fused_kernel_is_judged_by_the_worst_length_and_the_best_rival() -> None:
    results = [
        # Too short for the aim on time, not for the one on memory.
        result("v1_64", 512, "triton", 9.0, peak=11),
        result("v1_64", 512, "four", 1.0),
        result("v1_64", 512, "two", 1.0, peak=10),
        result("v1_64", 4096, "triton", 1.0),
        result("v1_64", 4096, "four", 2.0, variant="flash"),
        result("v1_64", 4096, "four", 1.3, variant="cuDNN"),
        result("v1_64", 16384, "triton", 1.0),
        result("v1_64", 16384, "triton_fast", 0.5),
        result("v1_64", 16384, "four", 1.6),
        result("v1_64", 16384, "two", 0.1, peak=12, variant="cuDNN"),
        result("v1_64", 16384, "two", 0.2, peak=9, variant="flash"),
        result("v1_64", 32768, "triton", 9.0),
        result("v1_64", 32768, "four", 1.0),
        # flash-attn's own kernels count as four calls; other dtypes are not what the aims speak of.
        result("gda4_128", 8192, "triton", 1.0),
        result("gda4_128", 8192, "four", 1.2),
        result("gda4_128", 8192, "flash", 0.9),
        result("gda4_128", 8192, "triton", 9.0, dtype="float32"),
        result("v1_64_w128", 512, "triton", 1.0),
        result("v1_64_w128", 512, "four", 1.5),
        result("v1_64_packed", 4096, "triton", 1.0),
        result("v1_64_packed", 4096, "four", 1.0),
        result("v1_64_packed", 4096, "two", 1.0),
    ]
    judged = {
        (j["layout"], j["contender"], j["measure"], j["bound"]): (j["worst"], j["worst_at"], j["met"])
        for j in judge(results, CUDA)
    }
    approx = pytest.approx
    assert judged == {
        ("v1_64", "triton", "speed", 1.3): (approx(1.3), 4096, True),
        ("v1_64", "triton_fast", "speed", 1.3): (approx(3.2), 16384, True),
        ("gda4_128", "triton", "speed", 1.0): (approx(0.9), 8192, False),
        ("v1_64_w128", "triton", "speed", 1.5): (approx(1.5), 512, True),
        ("v1_64", "triton", "peak_bytes", 1.0): (approx(10 / 9), 16384, False),
        ("v1_64", "triton_fast", "peak_bytes", 1.0): (approx(10 / 9), 16384, False),
        ("v1_64_packed", "triton", "peak_bytes", 1.0): (approx(1.0), 4096, True),
    }
    assert judge(results, CPU) == []


def test_the_better_kernel_is_shown_and_aims_and_refusals_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        result("v1_64", 4096, "triton", 1.0),
        result("v1_64", 4096, "four", 2.0, variant="flash"),
        result("v1_64", 4096, "four", 1.2, variant="cuDNN"),
    ]
    mark_best(results)
    assert [r["best"] for r in results] == [True, False, True]
    content = {
        "environment": {"device": "NVIDIA H100"},
        "copy": {"gb_per_second": 3000.0},
        "matrix": {"size": 8192, "tflops": {"bf16": 798.0}},
        "results": results,
        "refused": [result("v1_64", 4096, "naive", 1.0) | {"reason": "it ran out of memory"}],
        "not_begun": [problem("v2_64", "bf16", 8192, tokens=8192).cell()],
        "aims": judge(results, CUDA),
    }
    print_results(Console(width=100), content)
    printed = capsys.readouterr().out
    assert "copy bandwidth: 3,000.0 GB/s" in printed
    assert "matrix products of 8,192: bf16 798 TFLOP/s" in printed
    assert re.search(r"floor, by operations +500,000\.0 +500,000\.0 +500,000\.0", printed)  # microseconds
    assert re.search(r"4,096 +ours, deterministic +1\.0 +50% +1\.0 +50% +1\.0 +50%", printed)
    assert "four calls (cuDNN)" in printed
    assert "four calls (flash)" not in printed
    assert "refused naive formula at DIFF V1 (64, 128), bf16, 4,096: it ran out of memory" in printed
    assert "not begun, for the time was over: v2_64 bf16 8,192" in printed
    assert "not met  DIFF V1 (64, 128), ours, deterministic: at least 1.3 times" in printed
    assert "1.20 at worst (4,096)" in printed


def test_after_the_limit_no_new_size_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "attention.json"
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--contenders", "two", "--dtypes", "float32"]
    arguments += ["--layouts", "v1_64", "--lengths", "32", "48", "64", "--limit", "1e-9", "--output", str(path)]
    assert attention.main(arguments) == 0
    content = json.loads(path.read_text())
    begun = [r["length"] for r in content["results"]] + [c["length"] for c in content["not_begun"]]
    assert begun == [32, 48, 64]
    assert len(content["not_begun"]) >= 2


def test_what_was_measured_before_an_interrupt_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = attention.measure

    def interrupted(p: Problem, *arguments: Any, **rest: Any) -> Any:
        if p.length == 48:
            raise KeyboardInterrupt
        return measure(p, *arguments, **rest)

    monkeypatch.setattr(attention, "measure", interrupted)
    path = tmp_path / "attention.json"
    arguments = ["--quick", "--device", "cpu", "--threads", "1", "--contenders", "two", "--dtypes", "float32"]
    arguments += ["--layouts", "v1_64", "--lengths", "32", "48", "64", "--output", str(path)]
    assert attention.main(arguments) == 1
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert [r["length"] for r in content["results"]] == [32]
    assert path.with_suffix(".png").exists()
    assert "stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens is 0; it must be above 0"),
        (["--lengths", "512", "-1"], "--lengths is -1; it must be above 0"),
        (["--head-divisor", "-2"], "--head-divisor is -2; it must be above 0"),
        (["--contenders", "triton"], "--contenders triton: "),
    ],
)
def test_impossible_arguments_end_in_one_message(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path / "figures.json")]
    assert attention.main([*arguments, *output, "--device", "cpu", "--threads", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
