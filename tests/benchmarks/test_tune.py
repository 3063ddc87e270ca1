"""Tuning launch tables: what is left out, what is chosen, and what a run leaves in the table."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks.lib import rows
from benchmarks.ops import poly_norm
from benchmarks.tuning import tune
from benchmarks.tuning.candidates import Entry, Kernel, Shape, SizeClass, all_kernels
from motif_kernels import tuning

pytest.importorskip("triton", reason="Triton's autotuner needs triton")

CPU = torch.device("cpu")
NOWHERE = Path("no such table.json")
PRESENT, SLOW, FAST = ({"tile_bytes": n, "num_warps": 4} for n in (1, 2, 3))
KERNEL = "poly_norm_forward"


def shape(serve: Callable[[Entry, Tensor], Tensor] = lambda entry, out: out, columns: int = 64) -> Shape:
    """A case whose results may depend on the entry in force."""
    case = poly_norm.case("poly_norm", "bf16", 16, columns)

    def function(device: torch.device, entry: Entry) -> Any:
        return lambda t: serve(tuning.launch_choice(KERNEL, 0, CPU), case.formula(*t.values()))

    return Shape(case, function, rows.exact)


def tuned(monkeypatch: pytest.MonkeyPatch, timed: Shape, *also: Shape) -> tune.Outcome:
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
    monkeypatch.setattr(tune, "neighbours", lambda present: [present, SLOW, FAST])
    size_class = SizeClass(None, (timed,), also)
    kernel = Kernel(KERNEL, "forward", (size_class,), 0.06)
    return tune.Tuner(kernel, CPU, {}, 1, lambda text: None).tune(size_class, PRESENT)


def test_the_fastest_candidate_is_chosen_by_triton_autotuner(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = tuned(monkeypatch, shape())
    assert outcome.chosen == FAST
    assert outcome.speedup == pytest.approx(2.0)
    assert {r["entry"]["tile_bytes"]: r["seconds"] for r in outcome.results} == {1: 3.0, 2: 4.0, 3: 1.5}
    assert outcome.left_out == []


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
        assert outcome.chosen == PRESENT
        (row,) = outcome.left_out
        assert row["entry"] == FAST
        assert row["reason"].startswith(reason)


def test_splice_replaces_chosen_classes_and_keeps_the_finer_bounds_of_others() -> None:
    present = [{"up_to": 100, "a": 1}, {"up_to": 200, "a": 2}, {"up_to": 300, "a": 3}, {"up_to": None, "a": 4}]
    classes = [SizeClass(up_to, ()) for up_to in (150, 300, None)]
    assert tune.splice(present, classes, {}) == present
    assert tune.splice(present, classes, {150: {"a": 9}}) == [
        {"up_to": 150, "a": 9},
        {"up_to": 200, "a": 2},
        {"up_to": 300, "a": 3},
        {"up_to": None, "a": 4},
    ]
    assert tune.splice(present, classes, {150: {"a": 4}, 300: {"a": 4}}) == [{"up_to": None, "a": 4}]
    assert tune.entry_at(tune.splice(present, classes, {None: {"a": 7}}), None) == {"a": 7}


def test_a_table_keeps_the_kernels_that_were_not_tuned_and_where_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    tables = {"a": [{"up_to": None, "x": 1}], "b": [{"up_to": None, "x": 2}]}
    tune.write_table(path, NOWHERE, "NVIDIA H100 80GB HBM3", "first run", tables)
    assert json.loads(path.read_text()).get("sources") is None
    tune.write_table(path, NOWHERE, "NVIDIA Y", "second run", {"b": [{"up_to": 8, "x": 3}, {"up_to": None, "x": 4}]})
    assert json.loads(path.read_text()) == {
        "gpu": "NVIDIA H100",
        "source": "second run",
        "sources": {"a": "first run"},
        "kernels": {"a": [{"up_to": None, "x": 1}], "b": [{"up_to": 8, "x": 3}, {"up_to": None, "x": 4}]},
    }
    assert '      {"up_to": 8, "x": 3},\n' in path.read_text()
    # Written elsewhere, it begins with the table that is shipped.
    tune.write_table(tmp_path / "new.json", path, "NVIDIA X", "third run", {"c": [{"up_to": None, "x": 5}]})
    assert json.loads((tmp_path / "new.json").read_text())["sources"] == {"a": "first run", "b": "second run"}


def test_a_run_writes_a_table_that_the_package_reads_and_a_limit_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a CPU, where no kernel goes by the entry: which one is chosen is luck."""
    path = tmp_path / "new folder" / "gpu.json"
    kernels = [Kernel(KERNEL, "forward", (SizeClass(2048, (shape(),)), SizeClass(None, (shape(),))), 0.06)]
    monkeypatch.setattr(tune, "all_kernels", lambda: {KERNEL: kernels[0]})
    arguments = tune.parser().parse_args(["--output", str(path), "--jobs", "1"])
    assert tune.run(arguments, kernels, CPU, Console()) == 0
    content = json.loads(path.read_text())
    assert content["source"].startswith("measured on cpu: python -m benchmarks.tuning.tune")
    bounds = [entry["up_to"] for entry in content["kernels"][KERNEL]]
    assert bounds[-1] is None
    assert bounds[:-1] == sorted(bounds[:-1])
    assert str(tmp_path) not in path.read_text()
    shipped = tuning.tables() | {"fake": content | {"gpu": "Fake"}}
    monkeypatch.setattr(tuning, "tables", lambda: shipped)
    assert tuning.merged_table("NVIDIA Fake 9")[KERNEL] == content["kernels"][KERNEL]
    log = json.loads((path.parent / "gpu_log.json").read_text())
    assert [o["up_to"] for o in log["outcomes"]] == [2048, None]
    arguments.limit, before = 1e-9, path.read_text()
    assert tune.run(arguments, kernels, CPU, Console()) == 0
    assert path.read_text() == before
    assert "not reached, as before: poly_norm_forward, up to 2,048 bytes" in capsys.readouterr().out


def test_a_dry_run_prints_all_candidates_and_needs_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--device", "cpu", "--threads", "1"]) == 0
    printed = capsys.readouterr().out
    for name, kernel in all_kernels().items():
        assert printed.count(f"{name}, ") == len(kernel.classes)
    assert printed.count("(present)") == sum(len(kernel.classes) for kernel in all_kernels().values())


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--device", "cpu", "--threads", "1"]) == 2
    assert "error: torch sees no CUDA GPU here" in capsys.readouterr().err
    assert tune.main(["--limit", "0", "--device", "cpu", "--threads", "1"]) == 2
    assert "--limit is 0.0; it must be above 0" in capsys.readouterr().err
