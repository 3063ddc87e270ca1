from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.lib import report


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert report.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)
    assert report.spread([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="measure at least once"):
        report.spread([])


def test_environment_is_json_and_names_the_machine() -> None:
    env = report.environment("benchmarks.some", torch.device("cpu"), ["torch", "no-such-distribution"])
    assert json.loads(json.dumps(env)) == env
    assert env["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert env["versions"]["no-such-distribution"] is None
    assert env["threads"] == torch.get_num_threads()
    assert env["cpu"] in report.describe(env)


def test_a_busy_machine_is_warned_of() -> None:
    env = {"load_average_1_minute": 1.5, "cores": 2}
    assert "load average 1.5 on 2 cores" in str(report.busy_warning(env))
    assert report.busy_warning(env | {"load_average_1_minute": 0.1}) is None
    assert report.busy_warning(env | {"load_average_1_minute": None}) is None


def test_json_replaces_a_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "results" / "figures.json"
    report.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_a_table_shows_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=80).print(report.table("Speed", ["model", "tokens/s"], [["ours", "1,234"]]))
    printed = capsys.readouterr().out
    for text in ("Speed", "model", "tokens/s", "ours", "1,234"):
        assert text in printed


def test_bars_stand_at_their_values_with_whiskers_in_view(tmp_path: Path) -> None:
    figure, axes = report.figure(1, 1, size=(4, 3))
    bars = axes[0][0]
    report.grouped_bars(
        bars,
        ["512", "2048"],
        {"a": [1.0, 2.0], "b": [3.0, 4.0]},
        colours={"a": "red", "b": "blue"},
        errors={"a": [(0.5, 1.5), (2.0, 2.0)], "b": [(3.0, 3.0), (3.0, 9.0)]},
    )
    heights = sorted(patch.get_height() for patch in bars.patches)
    assert heights == [1.0, 2.0, 3.0, 4.0]
    assert bars.get_ylim()[1] > 9.0
    assert [label.get_text() for label in bars.get_xticklabels()] == ["512", "2048"]
    assert {text.get_text() for text in bars.texts} == {"1.00", "2.00", "3.00", "4.00"}
    report.write_plot(tmp_path / "picture.png", figure)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
