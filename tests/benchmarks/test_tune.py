"""Tuning launch tables: what is left out, what is chosen, and what a run leaves in the table."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.lib.exact import exact_results, fault
from benchmarks.lib.shapes import draw_from
from benchmarks.ops import poly_norm
from benchmarks.tuning import kernels, trial, tune
from benchmarks.tuning.candidates import candidates
from benchmarks.tuning.kernels import Entry, Kernel, Shape, all_kernels
from benchmarks.tuning.schedule import Size, Verdict, explore
from benchmarks.tuning.table import LaunchTable
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


def clock(function: Callable[[], object], seconds: float) -> list[float]:
    """Goes by the entry in force."""
    entry = tuning.find_choice(KERNEL, 0, CPU)
    return [{1: 3.0, 2: 4.0, 3: 1.5}.get(entry["tile_bytes"] if entry else 0, 1.0)]


def kernel_on(timed: Sequence[Shape], further: Sequence[Shape] = (), *bounds: int) -> Kernel:
    return Kernel(KERNEL, "forward", dict.fromkeys((*bounds, None), (timed, further)), 0.06)


def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, timed: Shape, *further: Shape) -> dict[str, Any]:
    """What a run of the command says of one class."""
    monkeypatch.setattr(trial, "cpu_clock", clock)
    monkeypatch.setattr(tune, "candidates", lambda kernel, present: [PRESENT, SLOW, FAST])
    arguments = tune.parser().parse_args(["--output", str(tmp_path / "gpu.json"), "--jobs", "1"])
    tune.run(arguments, [kernel_on([timed], further)], CPU, Console())
    (outcome,) = json.loads((tmp_path / "gpu_log.json").read_text())["outcomes"]
    return outcome


def test_the_fastest_candidate_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    outcome = tuned(monkeypatch, tmp_path, shape())
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
    serve: Any, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for cases in ((shape(serve),), (shape(), shape(serve, columns=61))):  # among those timed, and the others
        outcome = tuned(monkeypatch, tmp_path, *cases)
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
    kernels = [kernel_on([shape()], (), 2048)]
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


def test_backends_that_were_not_measured_are_left_to_auto(tmp_path: Path) -> None:
    path, backend = tmp_path / "gpu.json", all_kernels()[kernels.BACKEND]
    for bound in (768, 384):  # by two runs
        LaunchTable(path, path, "Fake").choose(backend, bound, {"backend": "sdpa"}, "measured")
    content = json.loads(path.read_text())
    assert content["kernels"][kernels.BACKEND] == [{"up_to": n, "backend": "sdpa"} for n in (384, 768)]
    assert content["measured"] == {kernels.BACKEND: [384, 768]}
    assert LaunchTable(path, path, "Fake").entry(kernels.BACKEND, None) == {"backend": "triton"}


class FakeBench:
    """Compiles a candidate in so many looks, and measures what its entry says."""

    def __init__(self, looks: int = 2):
        self.log: list[tuple[str, str, int]] = []
        self.looks, self.running, self.most = looks, 0, 0

    def compile(self, size: Size, entry: Entry, further: bool) -> Callable[[], Verdict | None]:
        left, self.running = self.looks, self.running + 1
        self.most = max(self.most, self.running)
        self.log.append(("further" if further else "compile", size.kernel.name, entry["n"]))

        def ask() -> Verdict | None:
            nonlocal left
            left -= 1
            if left > 0:
                return None
            self.running -= 1
            return Verdict(entry.get("predicted"), entry.get("compiler"))

        return ask

    def measure(self, size: Size, entry: Entry) -> list[float] | str:
        self.log.append(("measure", size.kernel.name, entry["n"]))
        return entry.get("wrong") or [entry["seconds"]]

    def fault(self, size: Size, entry: Entry) -> str | None:
        return entry.get("fault")

    def note(self, size: Size, i: int | None) -> None:
        if i is None:
            self.log.append(("choose", size.kernel.name, size.entries[size.chosen or 0]["n"]))

    def of(self, what: str) -> list[tuple[str, int]]:
        return [(name, n) for event, name, n in self.log if event == what]


def size_of(name: str, *entries: Entry) -> Size:
    """A class whose candidates are numbered."""
    return Size(Kernel(name, "forward", {None: ([], [])}, 0.06), None, [{"n": i, **e} for i, e in enumerate(entries)])


def test_every_size_has_a_measured_choice_before_any_has_all_candidates() -> None:
    sizes = [size_of(name, *({"seconds": 5.0 - i} for i in range(4))) for name in "abc"]
    bench = FakeBench()
    explore(sizes, bench, jobs=2, deadline=math.inf)
    assert bench.of("compile") == [(name, i) for i in range(4) for name in "abc"]
    assert sorted(bench.of("measure")[:3]) == [(name, 0) for name in "abc"]
    assert sorted(bench.of("choose")[:3]) == [(name, 0) for name in "abc"]
    assert [size.chosen for size in sizes] == [3, 3, 3]
    assert bench.most == 2


def test_the_best_predicted_is_measured_first_and_the_hopeless_never() -> None:
    predicted = [1.0, 1.2, 0.7, 1.0]  # the second is past 1.5 times the third
    size = size_of("a", *({"seconds": p, "predicted": p} for p in predicted))
    bench = FakeBench(looks=1)
    explore([size], bench, jobs=4, deadline=math.inf)
    assert bench.of("measure") == [("a", 0), ("a", 2), ("a", 3)]
    assert list(size.reasons) == [1]
    assert size.chosen == 2


def test_one_is_chosen_only_if_it_compiles_measures_right_and_serves_the_further_cases() -> None:
    size = size_of(
        "a",
        {"seconds": 3.0, "compiler": "it spills"},  # in force: measured whatever is said of it
        {"seconds": 1.0, "compiler": "it spills"},
        {"seconds": 1.0, "wrong": "off"},
        {"seconds": 1.5, "fault": "off elsewhere"},
        {"seconds": 2.0},
        {"seconds": 2.99},
    )
    bench = FakeBench()
    explore([size], bench, jobs=3, deadline=math.inf)
    assert size.chosen == 4
    assert size.reasons == {1: "it spills", 2: "off", 3: "off elsewhere"}
    assert size.speedup == 1.5


def test_a_compilation_that_hangs_holds_nothing_up_and_the_time_ends() -> None:
    class Hangs(FakeBench):
        def compile(self, size: Size, entry: Entry, further: bool) -> Callable[[], Verdict | None]:
            return (lambda: None) if entry["n"] == 0 else super().compile(size, entry, further)

    size = size_of("a", {"seconds": 3.0}, {"seconds": 2.0})
    bench = Hangs()
    explore([size], bench, jobs=2, deadline=time.monotonic() + 0.2)
    assert size.chosen == 1


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
    shape = kernels._sums(4, 64)
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
