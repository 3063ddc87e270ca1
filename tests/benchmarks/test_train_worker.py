"""The process of a contender: what it weighs and says, and what becomes of one that fails."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from torch.autograd import DeviceType

from benchmarks.contenders import Sizes, match_parameters
from benchmarks.train_profile import cut_up
from benchmarks.train_step import Benchmark, finish, parser, resolve
from benchmarks.train_worker import Worker
from benchmarks.training import Failed, OutOfTime, Setup, TrainStep

TINY = Sizes(128, num_layers=1, head_dim=16, vocab_size=64, intermediate_size=352, intermediate_multiple=8)
SETUP = Setup(TINY, 16, "cpu", 1, autocast=True)


def worker(sizes: Sizes = TINY, name: str = "llama", **changes: Any) -> Worker:
    entry = dataclasses.replace(match_parameters([name], sizes)[name], **changes)
    return Worker(entry, dataclasses.replace(SETUP, sizes=sizes), "float32", 16)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_grows_by_what_a_wider_model_needs() -> None:
    peaks, parameters = [], []
    for width in (352, 1376):
        sizes = Sizes(128, 4, 16, 4096, width, 8)
        with worker(sizes) as process:
            peaks.append(process.prepare(2, None).peak_memory_bytes)
        parameters.append(match_parameters(["llama"], sizes)["llama"].parameters)
    # Weight, gradient and two moments in float32, and little more for so few tokens.
    grown = (peaks[1] - peaks[0]) / (16 * (parameters[1] - parameters[0]))
    assert 0.75 < grown < 2


def test_autocast_trains_without_a_process_group() -> None:
    entry = match_parameters(["diff_v2"], TINY)["diff_v2"]
    with Worker(entry, SETUP, "bf16", 16) as process:
        assert process.prepare(2, None).attention_operators == ("aten::_scaled_dot_product_flash_attention_for_cpu",)
        assert min(process.time(2, None)) > 0


def test_a_worker_that_dies_or_hangs_is_reported() -> None:
    with worker() as process:
        os.kill(process.process.pid or 0, 9)
        with pytest.raises(Failed, match="its process ended with exit code -9"):
            process.prepare(2, None)
    with worker() as process, pytest.raises(OutOfTime, match="the time was over"):
        process.prepare(2, 0.01)
    assert process.process.exitcode == -9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["gda", "llama"])
def test_compile_is_for_every_contenders_layers(name: str, autocast: bool) -> None:
    entry = match_parameters([name], TINY)[name]
    for compiled in (False, True):
        setup = dataclasses.replace(SETUP, autocast=autocast, compile=compiled)
        with setup.world():
            model: Any = TrainStep(entry, setup, "float32").model
        # What torch.nn.Module.compile leaves for calls to take.
        assert all((layer._compiled_call_impl is not None) == compiled for layer in model.model.layers)


def benchmark(tmp_path: Path, *arguments: str, **changes: dict[str, Any]) -> Benchmark:
    """A quick run of GDA and Llama, some of their entries changed."""
    words = ["--quick", "--device", "cpu", "--threads", "1", "--precisions", "float32", "--seq-lens", "16"]
    options = parser().parse_args([*words, "--models", "gda", "llama", "--rounds", "1", "--costs", *arguments])
    setup = resolve(options)
    entries = match_parameters(options.models, setup.sizes)
    entries = {name: dataclasses.replace(entry, **changes.get(name, {})) for name, entry in entries.items()}
    environment = {"device": "cpu", "cpu": "a CPU", "threads": 1, "versions": {}, "git": None, "date": "2026-01-01"}
    return Benchmark(options, setup, entries, environment, tmp_path / "figures.json")


def test_a_contender_that_fails_is_named_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = benchmark(tmp_path, gda={"parameters": 1})
    run.measure(Console())
    assert finish(run, Console(width=200)) == 1  # one of ours
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["complete"] is True
    assert [r["model"] for r in content["results"]] == ["llama"]
    (failed,) = content["failed"]
    assert (failed["model"], failed["during"], failed["out_of_time"]) == ("gda", "getting ready", False)
    assert failed["reason"].startswith("it failed with AssertionError: gda has 660,296 parameters")
    assert f"failed GDA 4:1 (float32, 16 tokens, getting ready): {failed['reason']}" in capsys.readouterr().out
    assert (tmp_path / "figures.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_in_the_limit_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = benchmark(tmp_path, "--precisions", "float32", "bf16", "--limit", "0.02")
    run.measure(Console())
    assert finish(run, Console(width=200)) == 1  # there is no figure at all
    content = json.loads((tmp_path / "figures.json").read_text())
    assert [(f["model"], f["out_of_time"]) for f in content["failed"]] == [("gda", True), ("llama", True)]
    assert content["not_begun"] == [{"precision": "bf16", "seq_len": 16}]
    printed = capsys.readouterr().out
    assert "stopped Llama (float32, 16 tokens, getting ready): the time was over" in printed
    assert "not begun, for the time was over: bf16, 16 tokens" in printed


def test_a_killed_run_leaves_the_figures_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed outright while the second precision is measured: the file has the first."""
    run = benchmark(tmp_path, "--precisions", "float32", "bf16", "--models", "llama")
    before = Worker.prepare

    def prepare(self: Worker, steps: int, timeout: float | None) -> Any:
        if run.content["results"]:
            raise SystemExit
        return before(self, steps, timeout)

    monkeypatch.setattr(Worker, "prepare", prepare)
    with pytest.raises(SystemExit):
        run.measure(Console())
    content = json.loads((tmp_path / "figures.json").read_text())
    assert content["complete"] is False
    assert [r["precision"] for r in content["results"]] == ["float32"]


def event(name: str, microseconds: float, *, kernel: bool = True, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=name,
        count=4,
        device_type=DeviceType.CUDA if kernel else DeviceType.CPU,
        is_user_annotation=annotation,
        self_device_time_total=microseconds,
        self_cpu_time_total=0.0 if kernel else microseconds,
    )


def test_the_largest_costs_are_kernels_and_their_shares_add_up() -> None:
    """An operator's row repeats its kernels' time and a named range spans them: neither is counted
    besides them.
    """
    kernels = [event(f"kernel {i}", 100.0 * i) for i in range(1, 8)]
    others = [event("aten::mm", 900.0, kernel=False), event("step: backward", 2000.0, annotation=True)]
    costs = cut_up([*kernels, *others], 2, 0.004, cuda=True)
    assert [c["name"] for c in costs["largest"]] == [f"kernel {i}" for i in (7, 6, 5, 4, 3)]
    assert costs["largest"][0] == {
        "name": "kernel 7",
        "seconds": pytest.approx(350e-6),
        "share": pytest.approx(0.25),
        "calls": 2,
    }
    assert costs["other"] == pytest.approx(300 / 2800)
    assert (costs["seconds"], costs["wall_seconds"]) == (pytest.approx(1.4e-3), 0.002)
    assert costs["kind"] == "GPU kernels"
