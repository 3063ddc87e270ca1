"""The command line: dispatch, suggestions, exit statuses."""

import errno
import importlib
import tempfile
import textwrap
from pathlib import Path

import pytest

import motifarch
from helpers.python_process import run_python
from motifarch import cli
from motifarch.cli import COMMANDS, main
from motifarch.growth import from_mla_sources, from_softmax_sources
from motifarch.growth.layouts import LAYOUTS


def outcome(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["data", "--help"]])
def test_the_overview_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["--version"]) == 0
    assert motifarch.__version__ in capsys.readouterr().out


def test_help_is_quick() -> None:
    """No help text imports what takes seconds, and each has an example of its command."""
    code = """
        import contextlib, io, sys
        from motifarch.cli import COMMANDS, run
        slow = {"torch", "transformers", "datasets", "numpy", "scipy", "pyarrow", "matplotlib", "tokenizers"}
        for command in COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
                run([*command.split(), "--help"])
            assert not slow & set(sys.modules), (command, slow & set(sys.modules))
            assert f"\\n  motifarch {command}" in printed.getvalue(), command
    """
    run_python(textwrap.dedent(code))


def test_a_section_and_a_field_are_explained_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["train", "--help", "optim", "run.steps"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--optim.lr: a number from 0 to 10; default 0.0005 Peak learning rate." in printed
    assert "--run.steps: " in printed
    assert "--run.seed" not in printed
    assert outcome(["train", "--help", "optm"]) == 2
    assert "did you mean 'optim'?" in capsys.readouterr().err


def test_grow_names_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["grow", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*from_softmax_sources.FAMILIES, *from_mla_sources.FAMILIES, *LAYOUTS))


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


@pytest.mark.slow
def test_libraries_say_nothing_as_they_are_loaded() -> None:
    code = """
    import os
    os.dup2(1, 2)  # what goes to standard error is seen too
    from motifarch.command_line import loading
    with loading():
        import bitsandbytes, datasets, peft, torchao.quantization, transformers
    """
    assert run_python(code) == ""
