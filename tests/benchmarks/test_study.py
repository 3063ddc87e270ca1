"""The head-ratio study as a part of benchmarks/gpu.sh: what it runs, and where it stops."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import study as part
from benchmarks.lib import report
from motifarch.data.prepare import build_parser
from motifarch.study.grid import read_grid
from motifarch.study.main import main as head_ratio


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(report.ROOT)


def grid_words(*, quick: bool) -> list[str]:
    """What follows `motifarch benchmark head-ratio`."""
    words = part.study(Path("data/none"), Path("runs/none"), quick=quick)
    return words[words.index("head-ratio") + 1 :]


def test_the_short_grid_compares_ratios_over_seeds_on_the_text_that_is_prepared() -> None:
    name, *overrides = grid_words(quick=False)
    grid = read_grid([name, *(word for word in overrides if word not in ("--output", "runs/none"))])
    assert grid.data.path == "data/none"
    assert sorted(v.ratio or 0 for v in grid.variants if v.attention in ("gda", "diff_v1")) == [0, 2, 4, 7]
    assert len(grid.seeds) >= 3
    prepared = build_parser().parse_args(part.prepare(Path("data/none"), quick=False)[3:])
    assert (prepared.seq_len, prepared.vocab_size) == (grid.data.seq_len, grid.data.vocab_size)
    assert prepared.output == Path("data/none")


def test_the_smoke_test_uses_the_same_grid_at_sizes_that_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        head_ratio([*grid_words(quick=True), "--data.source", "[stdlib]", "--data.vocab_size", "512", "--dry-run"]) == 0
    )
    printed = capsys.readouterr().out
    assert "equal parameters, to 1% of softmax gqa poly_norm" in printed
    assert "gda 4:1 poly_norm" in printed


def test_a_call_that_runs_out_of_time_stops_what_it_started_and_is_no_failure(tmp_path: Path) -> None:
    left = tmp_path / "asked"
    script = f"trap 'echo to stop > {left}; exit 143' TERM; sleep 60 & wait"
    assert part.finish(["bash", "-c", script], time.monotonic() + 2) is None
    assert left.read_text() == "to stop\n"
    assert part.finish([sys.executable, "-c", "raise SystemExit(3)"], time.monotonic() + 30) == 3


def test_the_study_goes_on_after_its_text_and_its_report_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def finish(command: list[str], deadline: float) -> int | None:
        commands.append(command)
        if len(commands) == 1:
            return 0
        folder = Path(command[command.index("--output") + 1])
        folder.mkdir(parents=True)
        for name in ("results.json", "report.html", "report.md"):
            (folder / name).write_text(name)
        return None

    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(part, "finish", finish)
    assert part.main(["--output", str(tmp_path / "out" / "study.json"), "--limit", "5"]) == 0
    assert ["prepare" in commands[0][2], "head-ratio" in commands[1]] == [True, True]
    kept = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert kept == {"study.json": "results.json", "study.html": "report.html", "study.md": "report.md"}
    assert "stopped after 5 s; the same command goes on" in capsys.readouterr().out


def test_text_that_cannot_be_prepared_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(part, "finish", lambda command, deadline: 2)
    assert part.main(["--output", str(tmp_path / "study.json")]) == 2
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_so_and_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(part, "missing_packages", lambda: ["datasets", "jsonargparse"])
    monkeypatch.setattr(part, "finish", lambda command, deadline: pytest.fail("something was started"))
    assert part.main(["--output", str(tmp_path / "study.json")]) == 0
    assert capsys.readouterr().out.startswith("not run: datasets, jsonargparse cannot be imported here")
