"""Tuning launch tables: what is left out, what is chosen, and what a run leaves in the table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.lib.exact import exact_results, fault
from benchmarks.lib.shapes import draw_from
from benchmarks.ops import poly_norm
from benchmarks.tuning import tune
from benchmarks.tuning.candidates import candidates
from benchmarks.tuning.tune import Entry, Kernel, Shape, all_kernels
from motif_kernels import tuning

pytest.importorskip("triton", reason="Triton's autotuner needs triton")

CPU = torch.device("cpu")
PRESENT, SLOW, FAST = ({"tile_bytes": n, "num_warps": 4} for n in (1, 2, 3))
KERNEL = "poly_norm_forward"


def shape(serve: Callable[[Entry, Tensor], Tensor] = lambda entry, out: out, columns: int = 64) -> Shape:
    """A case whose results may depend on the entry in force."""
    case = poly_norm.case("poly_norm", "bf16", 16, columns)

    def function(device: torch.device, entry: Entry) -> Any:
        return lambda t: serve(tuning.launch_choice(KERNEL, 0, CPU), case.formula(*t.values()))

    return Shape(case, function)


def tuned(monkeypatch: pytest.MonkeyPatch, timed: Shape, *also: Shape) -> dict[str, Any]:
    """An outcome by a clock that goes by the entry in force."""

    def clock(function: Callable[[], object], seconds: float) -> list[float]:
        seen = 0
        choose = tuning.overriding

        def spy(**entries: Entry) -> Any:
            nonlocal seen
            seen = entries[KERNEL]["tile_bytes"]
            return choose(**entries)

        with monkeypatch.context() as patch:
            patch.setattr(tuning, "overriding", spy)
            function()
        return [{1: 3.0, 2: 4.0, 3: 1.5}[seen]]

    monkeypatch.setattr(tune, "cpu_clock", clock)
    monkeypatch.setattr(tune, "candidates", lambda kernel, present: [present, SLOW, FAST])
    kernel = Kernel(KERNEL, "forward", {}, 0.06)
    return tune.Tuner(kernel, CPU, PRESENT, {}, 1).tune([timed], also)


def test_the_fastest_candidate_is_chosen_by_triton_autotuner(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = tuned(monkeypatch, shape())
    assert outcome["chosen"] == FAST
    assert outcome["speedup"] == pytest.approx(2.0)
    assert {r["entry"]["tile_bytes"]: r["seconds"] for r in outcome["results"]} == {1: 3.0, 2: 4.0, 3: 1.5}
    assert outcome["left_out"] == []


def wrong(entry: Entry, out: Tensor) -> Tensor:
    return out * (0 if entry == FAST else 1)


def unlaunchable(entry: Entry, out: Tensor) -> Tensor:
    if entry == FAST:
        raise RuntimeError("out of resource: shared memory")
    return out


@pytest.mark.parametrize(
    ("serve", "reason"), [(wrong, "its output is off by"), (unlaunchable, "it failed with RuntimeError: out of res")]
)
def test_a_candidate_that_does_not_serve_a_case_is_left_out_with_the_reason(
    serve: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cases in ((shape(serve),), (shape(), shape(serve, columns=61))):  # among those timed, and the others
        outcome = tuned(monkeypatch, *cases)
        assert outcome["chosen"] == PRESENT
        (row,) = outcome["left_out"]
        assert row["entry"] == FAST
        assert row["reason"].startswith(reason)


def test_a_run_writes_a_table_that_the_package_reads_and_keeps_what_it_does_not_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, where no kernel goes by the entry: which one is chosen is luck."""
    path = tmp_path / "gpu.json"
    old = [{"up_to": None, "tile_bytes": 2048, "num_warps": 4}]
    table = {"gpu": "Fake", "source": "before", "kernels": {"diff_combine_forward": old}}
    path.write_text(json.dumps(table))
    cases = [shape()], []
    kernels = [Kernel(KERNEL, "forward", {2048: cases, None: cases}, 0.06)]
    arguments = tune.parser().parse_args(["--output", str(path), "--jobs", "1"])
    assert tune.run(arguments, kernels, CPU, Console()) == 0
    content = json.loads(path.read_text())
    assert content["source"].startswith("measured on cpu: python -m benchmarks.tuning.tune")
    assert content["sources"] == {"diff_combine_forward": "before"}
    assert content["kernels"]["diff_combine_forward"] == old
    assert [entry["up_to"] for entry in content["kernels"][KERNEL]] == [2048, None]
    assert str(tmp_path) not in path.read_text()
    shipped = tuning.tables() | {"fake": content}
    monkeypatch.setattr(tuning, "tables", lambda: shipped)
    assert tuning.merged_table("NVIDIA Fake 9")[KERNEL] == content["kernels"][KERNEL]
    log = json.loads((tmp_path / "gpu_log.json").read_text())
    assert [o["up_to"] for o in log["outcomes"]] == [2048, None]
    arguments.limit, before = 1e-9, path.read_text()
    assert tune.run(arguments, kernels, CPU, Console()) == 0
    assert path.read_text() == before
    assert "not reached, as before: poly_norm_forward, up to 2048 bytes" in capsys.readouterr().out


def test_a_choice_keeps_every_bound_of_the_shipped_tables() -> None:
    kernels = all_kernels()
    for table in tuning.tables().values():
        for name, entries in table["kernels"].items():
            if name in kernels and entries is not None:
                assert {entry["up_to"] for entry in entries} <= kernels[name].classes.keys()


def test_the_sums_of_a_group_are_held_to_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from motif_kernels.impl import triton
    from motif_kernels.impl.cpu import poly_norm as cpu

    monkeypatch.setattr(triton, "poly_norm", cpu, raising=False)
    shape = tune._sums(4, 64)
    draw = draw_from(0, torch.float32, CPU)
    inputs = shape.case.make(draw)
    exact = exact_results(shape.case, inputs, draw)
    assert fault(exact.errors({"output": shape.function(CPU, PRESENT)(inputs)}), 1e-4) is None


def test_a_dry_run_prints_all_candidates_and_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--device", "cpu", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for name, kernel in all_kernels().items():
        assert printed.count(f"{name}, up to") == len(kernel.classes)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--device", "cpu", "--threads", "1"]) == 2
    assert "error: torch sees no CUDA GPU here" in capsys.readouterr().err


def test_attention_tries_every_tile_that_gives_its_warps_rows() -> None:
    entry = {"block_m": 64, "block_n": 32, "num_warps": 8, "num_stages": 2}
    forward = candidates("attention_forward", entry)
    assert forward[0] == entry
    assert {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 3} in forward
    assert {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 3} not in forward
    keys = candidates("attention_backward_keys", entry)
    assert keys[0] == entry
    wide = {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 2, "split": False}
    assert wide | {"block_m_both": 64} in keys
    assert wide | {"block_m_both": 32} in keys
    assert entry | {"split": True, "block_m_both": 64} in keys
