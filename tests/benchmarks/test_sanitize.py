"""The sanitizer's run, without a GPU: what it makes of reports, which processes it starts, and the
cases alone.
"""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import kernel_cases, sanitize
from benchmarks.sanitize import PLANTED, Outcome, Runner, read_report, verdict

CLEAN = """\
========= COMPUTE-SANITIZER
done: decode
done: PolyNorm
========= ERROR SUMMARY: 0 errors
"""
INVALID_READ = """\
========= COMPUTE-SANITIZER
done: decode
========= Invalid __global__ read of size 4 bytes
=========     at _split_kernel+0x5f0 in decoding.py:88
=========     by thread (31,0,0) in block (2,0,0)
=========     Access at 0x7f2b4a000400 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f2b4a000000 of size 1,024 bytes
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure"
Traceback (most recent call last):
RuntimeError: CUDA error: unspecified launch failure
========= ERROR SUMMARY: 33 errors
"""
CRASHED = """\
========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
Fatal Python error: Segmentation fault
"""
DIED = """\
========= COMPUTE-SANITIZER
done: decode
torch.OutOfMemoryError: CUDA out of memory
========= Target application returned an error
========= ERROR SUMMARY: 0 errors
"""
FOUND = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
========= ERROR SUMMARY: 1 error
"""


def read(output: str, status: int) -> Outcome:
    outcome = Outcome("family", ["decode", "PolyNorm"])
    read_report(outcome, output, status)
    return outcome


def test_a_report_without_errors_is_clean() -> None:
    outcome = read(CLEAN, 0)
    assert (outcome.good, outcome.errors, outcome.failure) == (True, 0, "")
    assert verdict([outcome]) == "clean"


def test_errors_are_counted_and_the_first_lines_kept() -> None:
    outcome = read(INVALID_READ, 1)
    assert (outcome.good, outcome.errors) == (False, 33)
    assert outcome.report[:2] == [
        "Invalid __global__ read of size 4 bytes",
        "at _split_kernel+0x5f0 in decoding.py:88",
    ]
    assert verdict([read(CLEAN, 0), outcome]) == "errors"


@pytest.mark.parametrize(
    ("output", "status", "reason", "line"),
    [
        (CRASHED, 255, "exit status 255 and without a summary", "Fatal Python error: Segmentation fault"),
        (DIED, 1, "exit status 1; not finished: PolyNorm", "torch.OutOfMemoryError: CUDA out of memory"),
        # Nothing was wrong, and nothing was run.
        (CLEAN.replace("done: PolyNorm\n", ""), 0, "exit status 0; not finished: PolyNorm", "done: decode"),
    ],
    ids=["the tool crashed", "the program died", "a case is missing"],
)
def test_what_did_not_run_to_its_end_is_not_clean(output: str, status: int, reason: str, line: str) -> None:
    outcome = read(output, status)
    assert not outcome.good
    assert reason in outcome.failure
    assert line in outcome.report
    assert verdict([read(CLEAN, 0), outcome]) == "failed"


class StandIn:
    """In place of the processes: what the sanitizer says of each."""

    def __init__(self, faulty: str = "", planted: str = FOUND):
        self.faulty, self.planted = faulty, planted
        self.begun: list[tuple[bool, tuple[str, ...]]] = []

    def process(self, cases: Sequence[str], *, sanitized: bool) -> tuple[str, int]:
        self.begun.append((sanitized, tuple(cases)))
        if list(cases) == [PLANTED]:
            return self.planted, 0
        if sanitized and self.faulty in cases:
            return INVALID_READ, 1
        done = "".join(f"done: {case}\n" for case in cases)
        return (f"========= COMPUTE-SANITIZER\n{done}========= ERROR SUMMARY: 0 errors\n" if sanitized else done), 0


def fake_sanitizer(folder: Path) -> str:
    path = folder / "compute-sanitizer"
    path.write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "print('Compute Sanitizer\\nVersion 2025.3.0.0 (build 1)' if '--version' in sys.argv else "
        "'  --tool arg\\n  --padding arg\\n  --print-limit arg')\n"
    )
    path.chmod(0o755)
    return str(path)


def run(stand_in: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, Any]]:
    """A run on made-up processes: its exit status and its file."""
    path = folder / "sanitize.json"
    sanitizer = fake_sanitizer(folder)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: sanitizer)
    monkeypatch.setattr(
        Runner, "process", lambda self, cases, *, sanitized: stand_in.process(cases, sanitized=sanitized)
    )
    arguments = Namespace(device="cpu", quick=False, limit=60.0, output=path)
    status = sanitize.run(arguments, Console(width=200))
    return status, json.loads(path.read_text())


def test_every_case_runs_without_the_sanitizer_and_then_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = StandIn()
    status, content = run(stand_in, tmp_path, monkeypatch)
    assert (status, content["status"], content["complete"]) == (0, "clean", True)
    assert content["tool"]["version"] == "2025.3.0.0 (build 1)"
    # What this version does not know is left out.
    assert content["tool"]["command"][1:] == ["--tool=memcheck", "--padding=4096", "--print-limit=20"]
    families = [tuple(of) for of in kernel_cases.FAMILIES.values()]
    assert stand_in.begun == [(True, (PLANTED,)), *((sanitized, of) for of in families for sanitized in (False, True))]
    assert [(c["family"], c["errors"]) for c in content["cases"]] == [
        (PLANTED, 1),
        *((family, 0) for family in kernel_cases.FAMILIES),
    ]


def test_a_family_with_errors_is_run_case_by_case(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in = StandIn(faulty="PolyNorm times up")
    status, content = run(stand_in, tmp_path, monkeypatch)
    assert (status, content["status"]) == (1, "errors")
    alone = {
        c["cases"][0]: c["errors"] for c in content["cases"] if c["family"] == "poly_norm" and len(c["cases"]) == 1
    }
    assert alone == {"PolyNorm": 0, "PolyNorm times up": 33, "PolyNorm times up, long rows": 0}
    printed = capsys.readouterr().out
    assert "33 errors: poly_norm: PolyNorm times up (" in printed
    assert "at _split_kernel+0x5f0 in decoding.py:88" in printed


def test_a_sanitizer_that_misses_the_planted_error_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = f"========= COMPUTE-SANITIZER\ndone: {PLANTED}\n========= ERROR SUMMARY: 0 errors\n"
    status, content = run(StandIn(planted=blind), tmp_path, monkeypatch)
    assert (status, content["status"]) == (1, "failed")
    assert "what is clean here means nothing" in capsys.readouterr().out


def test_without_a_sanitizer_it_says_so_and_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PATH", "CUDA_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sanitize.report, "environment", lambda *_: {"device": "GPU", "versions": {}, "git": None} | REST
    )
    assert sanitize.find_sanitizer() is None
    path = tmp_path / "out" / "sanitize.json"
    assert sanitize.main(["--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["status"] == "not_run"
    assert "compute-sanitizer is not on the PATH" in content["reason"]
    assert "not run: compute-sanitizer is not on the PATH" in capsys.readouterr().out


REST = {"threads": 1, "date": "2026-01-01T00:00:00", "cpu": ""}


def test_it_is_found_where_cuda_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert sanitize.find_sanitizer() is None
    assert fake_sanitizer(tmp_path / "bin") == sanitize.find_sanitizer()


def test_a_process_that_outlasts_the_limit_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # takes "-m benchmarks..." for a script that is not there
    runner = Runner(["/bin/sh", "-c", "sleep 60 & sleep 60"], "cpu", time.monotonic() + 0.5)
    began = time.monotonic()
    outcome = Outcome("family", ["decode"])
    with pytest.raises(TimeoutError):
        runner.process(outcome.cases, sanitized=True)
    assert time.monotonic() - began < 30  # not the sleepers' 60
    runner.deadline = 0.0
    assert runner.check("family", ["decode"]).failure == "the time was over"


def test_a_quick_run_proves_the_cases_in_their_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two families here; the others are run by tests/kernels/test_on_gpu.py."""
    few = {"decode": kernel_cases.FAMILIES["decode"], "combine": kernel_cases.FAMILIES["combine"]}
    monkeypatch.setattr(kernel_cases, "FAMILIES", few)
    path = tmp_path / "sanitize.json"
    assert sanitize.main(["--quick", "--device", "cpu", "--output", str(path)]) == 0
    content = json.loads(path.read_text())
    assert (content["status"], content["complete"], content["tool"]) == ("not_run", True, None)
    assert [c["family"] for c in content["cases"]] == ["decode", "combine"]
    assert all(not c["failure"] for c in content["cases"])


def test_a_case_that_fails_alone_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner([], "cpu", time.monotonic() + 120)
    outcome = runner.check("family", ["no such case"])
    assert outcome.failure == "without the sanitizer: exit status 2"
    assert any("there is no such case" in line for line in outcome.report)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "compute-sanitizer needs a CUDA GPU"),
        (["--device", "cpu", "--quick", "--limit", "0"], "--limit is 0; it must be above 0"),
        (["--device", "cpu", "--run", PLANTED], "there is no such case"),  # no GPU guards memory from it here
    ],
)
def test_impossible_arguments_end_in_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanitize.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
