"""The command line: dispatch, suggestions, exit statuses."""

import errno
import importlib
import tempfile
from pathlib import Path

import pytest

from motifarch import cli
from motifarch.cli import COMMANDS, main


def outcome(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["data", "--help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


@pytest.mark.parametrize(
    ("given", "meant"), [(["trian"], "train"), (["data", "perpare"], "data prepare"), (["exprot"], "export")]
)
def test_an_unknown_command_suggests(given: list[str], meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command")
    assert f"did you mean {meant!r}" in error
    assert error.count("\n") == 1


def test_an_error_for_people_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["train", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the recipe nowhere.yaml can't be read: No such file or directory; give the path of a YAML file"
    ]


def test_ctrl_c_before_the_start(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupted)
    assert outcome(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unforeseen_error_is_one_line_with_a_file_of_its_trace(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(argv: list[str]) -> int:
        raise KeyError("no\nsuch thing")

    monkeypatch.setattr(cli, "run", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert outcome(["train", "x.yaml"]) == 1
    error = capsys.readouterr().err
    (trace,) = tmp_path.iterdir()
    assert error.count("\n") == 1
    assert str(trace) in error
    assert "in broken" in trace.read_text()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_full_disk_under_any_command(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(argv: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/some/file")

    monkeypatch.setattr(importlib.import_module(COMMANDS[command][0]), "main", full)
    assert outcome(command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /some/file: No space left")
    assert error.count("\n") == 1
