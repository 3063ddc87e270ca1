"""`motifarch benchmark all` with stand-ins for the scripts: what runs, what a failure does, what is
kept and joined.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.made_up_study import made_up_results
from motifarch.errors import UserError
from motifarch.study.all_benchmarks import PARTS, main, repository

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
PICTURE = COMMITTED / "poly_norm_cpu.png"

# Writes a committed result as its own and notes that it ran; does instead what a file named after
# it says.
STAND_IN = f"""
import pathlib, shutil, sys, time
name, here = pathlib.Path(__file__).stem, pathlib.Path(__file__).parent
output = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
with (here / "ran.txt").open("a") as ran:
    print(name, *sys.argv[1:], file=ran)
print("begun")
behaviour = here / (name + ".behaviour")
match behaviour.read_text() if behaviour.exists() else "":
    case "fail":
        sys.exit("the disk is on fire")
    case "complain":
        status = 1
    case "hang":
        time.sleep(60)
    case _:
        status = 0
shutil.copy({str(COMMITTED)!r} + "/" + name + "_cpu.json", output)
shutil.copy({str(PICTURE)!r}, output.with_suffix(".png"))
sys.exit(status)
"""


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with stand-ins, which the command finds."""
    folder = tmp_path / "repository" / "benchmarks"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    for part in PARTS:
        if part.name != "study":
            (folder / f"{part.name}.py").write_text(STAND_IN)
    monkeypatch.setattr("motifarch.study.all_benchmarks.repository", lambda: folder.parent)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return folder


def ran(scripts: Path) -> list[str]:
    return [line.split()[0] for line in (scripts / "ran.txt").read_text().splitlines()]


def joined(output: Path) -> dict[str, dict[str, Any]]:
    return {part["name"]: part for part in json.loads((output / "all.json").read_text())["parts"]}


def test_one_that_fails_is_reported_and_the_others_are_joined(scripts: Path, tmp_path: Path) -> None:
    (scripts / "combine.behaviour").write_text("fail")
    (scripts / "decode.behaviour").write_text("complain")
    output = tmp_path / "out"
    assert main(["--output", str(output), "--quick"]) == 1
    assert ran(scripts) == ["attention", "poly_norm", "combine", "train_step", "decode"]
    parts = joined(output)
    assert parts["combine"]["status"] == "failed"
    assert "the disk is on fire" in parts["combine"]["reason"]
    assert parts["decode"]["status"] == "finished"
    assert parts["decode"]["reason"] == "exit status 1: its log says what went wrong beside the figures"
    assert parts["study"]["status"] == "not_run"
    assert "--study STUDY.yaml" in parts["study"]["reason"]
    assert "torch sees no GPU" in parts["gpu"]["reason"]
    assert "begun" in (output / "logs" / "attention.log").read_text()
    page, text = ((output / name).read_text() for name in ("report.html", "report.md"))
    assert "the disk is on fire" in text
    assert page.count('src="data:image/png;base64,') == 4
    # A figure from each, as its file has it.
    train = json.loads((COMMITTED / "train_step_cpu.json").read_text())["results"][0]
    assert f"{train['tokens_per_second']['median']:,.0f} ±" in text
    assert f"{train['peak_memory_bytes'] / 2**20:,.0f} |" in text
    for title in ("Attention", "PolyNorm", "A training step", "Decoding"):
        assert f"## {title}\n" in text


def test_what_has_finished_is_kept_until_it_is_asked_for_again(scripts: Path, tmp_path: Path) -> None:
    (scripts / "combine.behaviour").write_text("fail")
    command = ["--output", str(tmp_path / "out"), "--quick"]
    assert main(command) == 1
    (scripts / "combine.behaviour").unlink()
    (scripts / "ran.txt").unlink()
    assert main(command) == 0
    assert ran(scripts) == ["combine"]
    (scripts / "ran.txt").unlink()
    assert main([*command, "--again", "--only", "decode"]) == 0
    assert ran(scripts) == ["decode"]
    assert {name for name, part in joined(tmp_path / "out").items() if part["status"] == "finished"} == {
        part.name for part in PARTS if part.name != "study"
    }


def test_stopped_it_ends_its_benchmark_and_the_same_command_goes_on(scripts: Path, tmp_path: Path) -> None:
    (scripts / "poly_norm.behaviour").write_text("hang")
    output = tmp_path / "out"
    code = (
        "import pathlib, sys; import motifarch.study.all_benchmarks as a; "
        "a.repository = lambda: pathlib.Path(sys.argv[1]); sys.exit(a.main(sys.argv[2:]))"
    )
    words = [sys.executable, "-c", code, str(scripts.parent), "--output", str(output), "--quick"]
    process = subprocess.Popen([*words, "--only", "attention", "poly_norm"], stdout=subprocess.PIPE, text=True)
    log = output / "logs" / "poly_norm.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "begun" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 128 + signal.SIGINT
    assert time.monotonic() - began < 30
    parts = joined(output)
    assert parts["attention"]["status"] == "finished"
    assert parts["poly_norm"]["reason"] == "stopped by the user"


def test_a_study_is_run_by_its_own_command_and_joined(
    scripts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, output = tmp_path / "small.yaml", tmp_path / "out"
    study.write_text("tokens: 1")
    asked: list[list[str]] = []

    def stand_in(self: object, command: list[str], log: Path, *_: object) -> int:
        asked.append(command)
        (output / "study").mkdir()
        (output / "study" / "results.json").write_text(json.dumps(made_up_results()))
        return 0

    monkeypatch.setattr("motifarch.study.all_benchmarks.Benchmarks._process", stand_in)
    assert main(["--output", str(output), "--only", "study", "--study", str(study)]) == 0
    words = ["motifarch.cli", "benchmark", "head-ratio", str(study), "--output", str(output / "study")]
    assert asked[0][2:] == words
    text = (output / "report.md").read_text()
    assert "### In short" in text
    assert "The lowest mean validation loss is GDA 4:1's" in text


def test_what_moved_is_printed_and_reported(scripts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = COMMITTED / "train_step_cpu.json"
    output = tmp_path / "out"
    assert main(["--output", str(output), "--quick", "--only", "train_step", "--compare", str(old)]) == 0
    assert "32 figures compared; 0 moved, 32 within their noise" in capsys.readouterr().out
    assert "## What moved" in (output / "report.md").read_text()


def test_without_the_repository_the_fix_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clone its repository and run this command in its root"):
        repository(tmp_path, tmp_path)
    assert (repository() / "benchmarks" / "attention.py").is_file()


def test_a_wrong_command_line_stops_before_anything_runs(scripts: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--study .*none\.yaml is no file"):
        main(["--output", str(tmp_path / "out"), "--study", str(tmp_path / "none.yaml")])
    with pytest.raises(UserError, match="invalid choice: 'growth'"):
        main(["--output", str(tmp_path / "out"), "--only", "growth"])
    assert not (scripts / "ran.txt").exists()
    assert not (tmp_path / "out").exists()
