"""Tuning launch tables: what is tried, whom it refuses, what it chooses, and what it leaves in the
table.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.timing import Clock, CpuClock, Timing, Work
from benchmarks.tune_candidates import BACKEND, Entry, Kernel, SizeClass, all_kernels, quick
from benchmarks.tune_launch import Compilers, OutOfTimeError, entry_at, spilled_bytes
from benchmarks.tune_measure import Bench, disagreement
from benchmarks.tune_problems import Attention, Epilogue
from benchmarks.tune_table import gpu_name_part, present_table, splice, write_table
from motif_kernels import tuning

pytest.importorskip("triton", reason="launching needs triton")

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NOWHERE = Path("no such table.json")

SLOW, FAST, WRONG = (
    {"tile_bytes": 1024, "num_warps": 4},
    {"tile_bytes": 2048, "num_warps": 4},
    {"tile_bytes": 512, "num_warps": 4, "tiles": 2},  # the forward kernel walks one tile: half the heads stay unwritten
)
PRESENT = {"tile_bytes": 4096, "num_warps": 8}  # diff_combine_forward's


class FakeClock(Clock):
    """Runs the work; the time is what is said of the entry that the kernel was given."""

    def __init__(self, kernel: str, seconds: Mapping[int, float]):
        self.kernel, self.seconds = kernel, seconds
        self.seen: list[Entry] = []

    def time(self, work: Work) -> Timing:
        choose = tuning.launch_choice

        def spy(kernel: str, size: int, device: torch.device) -> Entry:
            entry = choose(kernel, size, device)
            if kernel == self.kernel:
                self.seen.append(entry)
            return entry

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("motif_kernels.impl.triton.combine.launch_choice", spy)
            work.call(work.prepare())
        seconds = self.seconds[self.seen[-1]["tile_bytes"]]
        return Timing(seconds, seconds)


def bench(clock: Clock, said: list[str] | None = None, **more: Any) -> Bench:
    say = said.append if said is not None else lambda _: None
    return Bench(DEVICE, clock, seconds=0.0, minimum=2, say=say, **more)


def combine_kernel(*candidates: Entry, also: tuple[Any, ...] = ()) -> tuple[Kernel, SizeClass]:
    size_class = SizeClass(None, (Epilogue(9, 2, 2, 64),), also, candidates)
    return Kernel("diff_combine_forward", (size_class,), tolerance=0.06, spilled_bytes=0), size_class


def table(gpu: str = "") -> dict[str, list[Entry]]:
    return present_table(NOWHERE, NOWHERE, gpu)


def test_candidates_are_launched_with_their_own_entries_and_the_fastest_is_chosen() -> None:
    clock = FakeClock("diff_combine_forward", {4096: 3.0, 1024: 4.0, 2048: 1.5})
    outcome = bench(clock).tune(*combine_kernel(SLOW, FAST), table())
    assert outcome.chosen == FAST
    assert outcome.speedup == pytest.approx(2.0)
    assert (outcome.seconds, outcome.present_seconds) == (1.5, 3.0)
    assert outcome.refused == []
    assert [r["entry"] for r in outcome.results] == [PRESENT, SLOW, FAST]
    assert {e["tile_bytes"] for e in clock.seen} == {4096, 1024, 2048}
    assert tuning._overrides == {}


def test_a_candidate_with_other_results_is_refused_by_name_and_not_timed() -> None:
    said: list[str] = []
    clock = FakeClock("diff_combine_forward", {4096: 3.0, 512: 0.1})
    outcome = bench(clock, said).tune(*combine_kernel(WRONG), table())
    assert outcome.chosen == PRESENT
    (refused,) = outcome.refused
    assert refused["entry"] == WRONG
    assert refused["reason"] == "its output is not finite everywhere"
    assert "tile_bytes 512, num_warps 4, tiles 2 at 9 x 4:2 heads of 64: its output is not finite" in said[0]
    assert 512 not in {e["tile_bytes"] for e in clock.seen}


def test_a_candidate_that_cannot_be_launched_is_refused_with_the_reason() -> None:
    broken = {"tile_bytes": 8192}
    outcome = bench(FakeClock("diff_combine_forward", {4096: 1.0})).tune(*combine_kernel(broken), table())
    assert outcome.chosen == PRESENT
    assert outcome.refused[0]["reason"] == "it failed with KeyError: 'num_warps'"


def test_what_comes_before_a_kernel_may_fail_without_ending_the_run() -> None:
    kernel = all_kernels()["attention_prepare"]
    size_class = SizeClass(None, (Attention(16, 16, 1, 1, 20),), (), ({"tile_bytes": 512, "num_warps": 4, "tiles": 1},))
    broken = {**table(), "attention_forward": [{"up_to": None, "block_m": 16, "block_n": 16, "num_warps": 4}]}
    outcome = bench(CpuClock()).tune(kernel, size_class, broken)
    assert outcome.chosen is None
    assert len(outcome.refused) == 2
    assert {r["reason"] for r in outcome.refused} == {
        "what comes before it cannot be run: it failed with KeyError: 'num_stages'"
    }


def test_a_candidate_that_spills_is_refused_and_the_present_entry_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tune_measure.spilled_bytes", lambda launched: 72)
    outcome = bench(FakeClock("diff_combine_forward", {4096: 3.0})).tune(*combine_kernel(FAST), table())
    assert outcome.chosen == PRESENT
    assert outcome.refused[0]["reason"] == "it spills 72 bytes a thread; 0 are allowed"


def test_spills_are_counted_in_bytes_over_all_kernels_of_a_launch() -> None:
    @dataclasses.dataclass
    class Compiled:
        n_spills: int | None

    assert spilled_bytes([Compiled(0), Compiled(18), Compiled(2), Compiled(None), None]) == 72
    assert spilled_bytes([]) == 0


def test_the_fastest_gives_way_where_it_cannot_serve_the_rest_of_its_class() -> None:
    # A single head is in the first tile, and nothing is left out: only the further problem shows
    # what is wrong.
    kernel, size_class = combine_kernel(WRONG, FAST, also=(Epilogue(50, 2, 2, 64),))
    size_class = dataclasses.replace(size_class, timed=(Epilogue(1, 1, 2, 64),))
    clock = FakeClock(kernel.name, {4096: 3.0, 512: 1.0, 2048: 2.0})
    outcome = bench(clock).tune(kernel, size_class, table())
    assert outcome.chosen == FAST
    assert [(r["entry"], r["problem"]) for r in outcome.refused] == [(WRONG, "50 x 4:2 heads of 64")]
    assert len(outcome.results) == 3


def test_disagreement_is_relative_to_the_values_and_never_passes_nan() -> None:
    right = {"output": torch.tensor([1.0, -1.0, 1.0])}
    assert disagreement(right, {"output": torch.tensor([1.0, -1.0, 1.1])}, 0.06) is None
    reason = disagreement(right, {"output": torch.tensor([1.0, 1.0, 1.0])}, 0.06)
    assert reason == (
        "its output differs from the present entry's by up to 2 (1 relative to the value and their root mean square; "
        "0.06 is allowed)"
    )
    assert disagreement(right, {"output": torch.tensor([1.0, torch.nan, 1.0])}, 0.06) is not None


@pytest.mark.parametrize(
    "name",
    [
        "attention_backward_keys",
        "attention_backward_queries",
        "attention_prepare",
        "decoding_split",
        "poly_norm_backward",
    ],
)
def test_kernels_are_launched_alone_and_their_candidates_agree(name: str) -> None:
    kernel = quick(all_kernels()[name])
    (size_class,) = kernel.classes
    timed = tuple(dataclasses.replace(p, tokens=40) if isinstance(p, Attention) else p for p in size_class.timed)
    also = tuple(dataclasses.replace(p, tokens=20) if isinstance(p, Attention) else p for p in size_class.also)
    outcome = bench(CpuClock()).tune(kernel, dataclasses.replace(size_class, timed=timed, also=also), table())
    assert outcome.refused == []
    assert len(outcome.results) == 3
    assert outcome.chosen


def test_backends_are_held_to_each_other_and_those_that_cannot_serve_are_refused() -> None:
    problem = Attention(16, 16, 2, 1, 20)
    candidates = tuple({"backend": name} for name in ("sdpa", "flash"))
    size_class = SizeClass(None, (problem,), (), candidates)
    kernel = Kernel(BACKEND, (size_class,), tolerance=0.15, spilled_bytes=0)
    present = {**table(), BACKEND: [{"up_to": None, "backend": "reference"}]}
    outcome = bench(CpuClock()).tune(kernel, size_class, present)
    assert {r["entry"]["backend"] for r in outcome.results} == {"reference", "sdpa"}
    if DEVICE.type == "cpu":
        assert [r["entry"]["backend"] for r in outcome.refused] == ["flash"]


def test_every_problem_falls_into_its_class() -> None:
    for name, kernel in all_kernels().items():
        lower = 0
        assert kernel.classes[-1].up_to is None
        for size_class in kernel.classes:
            for problem in (*size_class.timed, *size_class.also):
                size = problem.size(name)
                assert lower < size or name.startswith("diff_combine"), (name, problem)
                assert size_class.up_to is None or size <= size_class.up_to, (name, problem)
            assert len({json.dumps(c) for c in size_class.candidates}) == len(size_class.candidates) > 1
            lower = size_class.up_to or lower


def test_splice_replaces_chosen_classes_and_keeps_the_finer_bounds_of_others() -> None:
    present = [{"up_to": 100, "a": 1}, {"up_to": 200, "a": 2}, {"up_to": 300, "a": 3}, {"up_to": None, "a": 4}]
    classes = [SizeClass(up_to, (), (), ()) for up_to in (150, 300, None)]
    assert splice(present, classes, {}) == present
    assert splice(present, classes, {150: {"a": 9}}) == [
        {"up_to": 150, "a": 9},
        {"up_to": 200, "a": 2},
        {"up_to": 300, "a": 3},
        {"up_to": None, "a": 4},
    ]
    assert splice(present, classes, {150: {"a": 4}, 300: {"a": 4}}) == [{"up_to": None, "a": 4}]
    assert entry_at(splice(present, classes, {None: {"a": 7}}), None) == {"a": 7}


def test_a_table_keeps_the_kernels_that_were_not_tuned_and_where_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    write_table(
        path, NOWHERE, "NVIDIA X", "first run", {"a": [{"up_to": None, "x": 1}], "b": [{"up_to": None, "x": 2}]}
    )
    assert json.loads(path.read_text()).get("sources") is None
    write_table(path, NOWHERE, "NVIDIA Y", "second run", {"b": [{"up_to": 8, "x": 3}, {"up_to": None, "x": 4}]})
    content = json.loads(path.read_text())
    assert content == {
        "gpu": "NVIDIA X",
        "source": "second run",
        "sources": {"a": "first run"},
        "kernels": {"a": [{"up_to": None, "x": 1}], "b": [{"up_to": 8, "x": 3}, {"up_to": None, "x": 4}]},
    }
    assert '      {"up_to": 8, "x": 3},\n' in path.read_text()
    # Written elsewhere, it begins with the table that is shipped.
    write_table(tmp_path / "new.json", path, "NVIDIA X", "third run", {"c": [{"up_to": None, "x": 5}]})
    assert json.loads((tmp_path / "new.json").read_text())["sources"] == {"a": "first run", "b": "second run"}
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".tmp"] == []


def test_the_present_table_is_the_file_over_what_is_shipped(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    write_table(path, NOWHERE, "NVIDIA X", "a run", {"poly_norm_sums": [{"up_to": None, "x": 1}]})
    found = present_table(path, NOWHERE, "NVIDIA B200")
    assert found["poly_norm_sums"] == [{"up_to": None, "x": 1}]
    assert found["attention_forward"] == tuning.merged_table("NVIDIA B200")["attention_forward"]
    assert found[BACKEND]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4"),
        ("NVIDIA B200", "NVIDIA B200"),
    ],
)
def test_a_table_serves_the_gpu_whatever_its_memory(name: str, part: str) -> None:
    assert gpu_name_part(name) == part
    assert part in name


def small_run(path: Path, *arguments: str) -> int:
    return tune.main(["--quick", "--seconds", "0.001", "--jobs", "1", "--output", str(path), *arguments])


def test_a_run_writes_a_table_in_the_format_and_a_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "gpu.json"
    assert small_run(path, "--kernels", "poly_norm_sums", "diff_combine_forward") == 0
    first = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert "poly_norm_sums, up to 2,048 bytes" in printed
    assert "speed-" in printed
    assert str(path) in printed
    assert small_run(path, "--kernels", "diff_combine_backward") == 0
    content = json.loads(path.read_text())
    assert content["kernels"].keys() == {"poly_norm_sums", "diff_combine_forward", "diff_combine_backward"}
    for kernel in first["kernels"]:
        assert content["kernels"][kernel] == first["kernels"][kernel]
        assert content["sources"][kernel] == first["source"]
    assert re.match(
        r"python -m benchmarks\.tune --kernels .*torch \d.*, triton \d.*, \d{4}-\d\d-\d\d$", first["source"]
    )
    assert str(tmp_path) not in path.read_text()
    for entries in content["kernels"].values():
        bounds = [e["up_to"] for e in entries]
        assert bounds[-1] is None
        assert bounds[:-1] == sorted(bounds[:-1])
    # The sizes that were not tried have what they had; the package reads the file as one of its
    # tables.
    shipped = tuning.tables() | {"fake": content | {"gpu": "Fake"}}
    monkeypatch.setattr(tuning, "tables", lambda: shipped)
    merged = tuning.merged_table("NVIDIA Fake 9")
    assert merged["poly_norm_sums"] == content["kernels"]["poly_norm_sums"]
    assert entry_at(merged["poly_norm_sums"], None) == entry_at(tuning.merged_table("")["poly_norm_sums"], None)

    log = json.loads((path.parent / "gpu_log.json").read_text())
    assert log["complete"] is True
    assert log["kernels"].keys() == content["kernels"].keys()
    (sums,) = log["kernels"]["poly_norm_sums"]
    assert len(sums["results"]) == 3
    assert sums["chosen"] == entry_at(content["kernels"]["poly_norm_sums"], 2048)
    assert sums["seconds"] == min(r["seconds"]["median"] for r in sums["results"])


def test_a_limit_leaves_what_was_not_reached_as_it_was_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    assert small_run(path, "--kernels", "poly_norm_sums", "diff_combine_forward", "--limit", "1e-9") == 0
    assert not path.exists()
    printed = " ".join(capsys.readouterr().out.split())
    assert "not reached, as before: poly_norm_sums, up to 2,048 bytes; diff_combine_forward, up to 128 bytes" in printed
    assert json.loads((tmp_path / "gpu_log.json").read_text())["complete"] is False


def test_a_dry_run_prints_all_candidates_and_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for name, kernel in all_kernels().items():
        assert printed.count(f"{name}, ") == len(kernel.classes)
    assert "attention_forward, up to 384 bytes: 11 candidates" in printed
    assert "  timed: (128, 256), 32:8 heads, 2 x 4,096\n" in printed
    assert "  must serve: (192, 128), 6:2 heads, 2 x 1,000\n" in printed
    assert "  block_m 64, block_n 64, num_warps 4, num_stages 3\n" in printed
    assert printed.count("(present)") == sum(len(kernel.classes) for kernel in all_kernels().values())


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: torch sees no CUDA GPU here")
    assert "--dry-run" in message
    assert tune.main(["--seconds", "0"]) == 2
    assert "--seconds is 0.0; it must be above 0" in capsys.readouterr().err


def test_the_gpu_that_a_launch_breaks_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Bench) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Bench, "synchronize", broken)
    with pytest.raises(tune.UserError, match=r"diff_combine_forward with tile_bytes 4096.*illegal memory access"):
        bench(CpuClock()).tune(*combine_kernel(FAST), table())


def test_compilers_work_side_by_side_and_outlive_a_crash() -> None:
    compilers = Compilers(2, work=eval)  # stands in for the compiler; what it is told to do is the task
    tasks: list[Any] = [("None",), ("'it is too large'",), ("__import__('os')._exit(1)",), ("None",)]
    assert compilers.compile(tasks, seconds=60) == [None, "it is too large", "the compiler crashed", None]
    assert compilers.compile(tasks[:2], seconds=60) == [None, "it is too large"]
    with pytest.raises(OutOfTimeError):
        compilers.compile([("__import__('time').sleep(3)",)], seconds=0.1)


def test_what_does_not_compile_is_refused_without_being_launched() -> None:
    class Answering(Compilers):
        def __init__(self) -> None:
            self.asked: list[Any] = []

        def compile(self, tasks: Any, seconds: float | None) -> list[str | None]:
            self.asked += tasks
            return ["it is too large" if entry == SLOW else None for _, _, entry, *_ in tasks]

    compilers = Answering()
    clock = FakeClock("diff_combine_forward", {4096: 3.0, 1024: 1.0, 2048: 2.0})
    also = (Epilogue(50, 2, 2, 64),)
    outcome = bench(clock, compilers=compilers).tune(*combine_kernel(SLOW, FAST, also=also), table())
    assert outcome.chosen == FAST
    assert [(r["entry"], r["reason"]) for r in outcome.refused] == [(SLOW, "it is too large")]
    assert 1024 not in {e["tile_bytes"] for e in clock.seen}
    assert [(problem, entry) for _, problem, entry, *_ in compilers.asked][3:] == [(also[0], PRESENT), (also[0], FAST)]


COMPILE = """
import torch
from benchmarks.tune_launch import compile_candidate
from benchmarks.tune_problems import Rows
from benchmarks.tune_table import present_table
from benchmarks.compiled_kernels import compile_only
from pathlib import Path

table = present_table(Path("nowhere"), Path("nowhere"), "")
with compile_only(90) as found:
    entry = {"tile_bytes": 2048, "num_warps": 2}
    assert compile_candidate("poly_norm_forward", Rows(64, 512), entry, table, "cpu") is None
    reason = compile_candidate("poly_norm_forward", Rows(64, 512), entry | {"num_warps": 3}, table, "cpu")
assert reason.startswith("it failed with "), reason
assert [(u.kernel, u.constants["num_warps"]) for u in found] == [("poly_norm._forward_kernel", 2)], found
"""


def test_compiling_ahead_compiles_the_candidate_and_nothing_else() -> None:
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
