"""python -m benchmarks.run and benchmarks.compare: what is joined, kept and called moved."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.compare import compare, main, read_results
from benchmarks.lib.figures import describe
from helpers.distributed import TIMEOUT, wait_until
from motifarch.cli import run as motifarch
from motifarch.errors import UserError

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results"
BENCHMARKS = ("train_step", "attention", "poly_norm", "combine", "generate")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Benchmarks that end with committed figures; combine fails as long as it is named first."""
    names = ["fails:combine"]

    def execute(command: list[str], log: Path) -> int:
        output = Path(command[command.index("--output") + 1])
        names.append(output.stem)
        if names[0] == f"fails:{output.stem}":
            log.write_text("begun\nthe disk is on fire\n")
            return 1
        output.write_text((COMMITTED / f"{output.stem}_cpu.json").read_text())
        return 0

    monkeypatch.setattr(run, "execute", execute)
    return names


def test_what_failed_is_named_and_tried_again_and_the_rest_is_kept(ran: list[str], tmp_path: Path) -> None:
    command = ["--output", str(tmp_path), "--quick", "--only", "train_step", "combine", "study"]
    old = ["--compare", str(COMMITTED / "train_step_cpu.json")]
    assert run.main([*command, *old]) == 1
    parts = {part["name"]: part for part in json.loads((tmp_path / "all.json").read_text())["parts"]}
    assert {name: part["status"] for name, part in parts.items()} == {
        "train_step": "finished",
        "combine": "failed",
        "study": "not_run",
    }
    assert parts["combine"]["reason"].endswith("the last line it printed: the disk is on fire")
    page, text = ((tmp_path / f"report.{suffix}").read_text() for suffix in ("html", "md"))
    train = json.loads((COMMITTED / "train_step_cpu.json").read_text())["results"][0]
    for report in (page, text):
        assert f"{train['tokens_per_second']['median']:,.0f} ±" in report
        assert "the disk is on fire" in report
        assert "32 figures compared; 0 moved, 32 within noise" in report
    ran[:] = ["none"]
    assert run.main(command) == 0
    assert ran[1:] == ["combine"]
    assert run.main([*command, "--again"]) == 0
    assert ran[1:] == ["combine", "train_step", "combine"]


def test_a_stop_reaches_the_benchmark_which_writes_what_it_has(tmp_path: Path) -> None:
    told, log = tmp_path / "told", tmp_path / "log"
    script = f"trap 'echo to stop > {told}; exit 143' TERM; echo begun; sleep 60 & wait"
    call = f"execute(['bash', '-c', {script!r}], Path({str(log)!r}))"
    code = f"from benchmarks.run import *\nwith cli.terminate_as_interrupt(): {call}"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=run.report.ROOT, stderr=subprocess.PIPE)
    wait_until(lambda: log.exists() and bool(log.read_text()))
    process.terminate()
    assert b"KeyboardInterrupt" in process.communicate(timeout=TIMEOUT)[1]
    assert told.read_text() == "to stop\n"


def test_the_former_command_names_its_successor() -> None:
    with pytest.raises(UserError, match=r"python -m benchmarks\.run --output DIR"):
        motifarch(["benchmark", "all", "--output", "somewhere"])


def test_a_layout_is_told_by_its_label() -> None:
    layouts: dict[str, Any] = {"a": "DIFF V1", "b": {"label": "GDA 4:1"}}
    told = [describe([("layout", name), ("length", 2048)], {"layouts": layouts}) for name in "abc"]
    assert told == ["DIFF V1, length 2,048", "GDA 4:1, length 2,048", "c, length 2,048"]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_figures_are_compared_by_the_spread_of_their_repetitions(name: str) -> None:
    old = read_results(COMMITTED / f"{name}_cpu.json")
    new = copy.deepcopy(old)
    assert {r["verdict"] for r in compare(old, new)["rows"]} == {"within noise"}

    def slower(content: Any) -> None:
        """Twice the times, half the rates."""
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            if isinstance(value, dict) and value.keys() >= {"median", "lower", "upper"}:
                content[key] = {k: v * (0.5 if "per_second" in str(key) else 2.0) for k, v in value.items()}
            elif isinstance(value, dict | list):
                slower(value)

    slower(new)
    rows = compare(old, new)["rows"]
    moved = [r for r in rows if r["verdict"] == "moved"]
    assert len(moved) > 0.9 * len(rows)
    assert all(r["better"] is False for r in moved)


def test_a_study_has_not_moved_from_itself() -> None:
    study = read_results(COMMITTED / "head_ratio_study_cpu" / "results.json")
    assert {r["verdict"] for r in compare(study, study)["rows"]} <= {"the same", "within noise"}


def test_results_that_cannot_be_compared_end_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "none.json", tmp_path / "text.json", tmp_path / "other.json"]
    files[1].write_text("no json")
    files[2].write_text("{}")
    other = str(COMMITTED / "growth_cpu.json")
    for path, message in zip(files, ("can't be read", "is no JSON", "holds no results"), strict=True):
        assert main([str(path), other]) == 2
        assert message in capsys.readouterr().err
    assert main([other, str(COMMITTED / "train_step_cpu.json")]) == 2
    assert "the new results hold train_step, the old ones growth" in capsys.readouterr().err
