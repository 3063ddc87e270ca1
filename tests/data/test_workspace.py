from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from motifarch.data.workspace import claim, new_folder
from motifarch.errors import UserError


def make(output: Path, content: str, said: list[str]) -> None:
    with claim(output, said.append), new_folder(output) as folder:
        (folder / "file").write_text(content)


def test_appears_complete_and_leaves_nothing_beside(tmp_path: Path) -> None:
    said: list[str] = []
    output = tmp_path / "deep" / "data"
    make(output, "first", said)
    make(output, "second", said)
    assert (output / "file").read_text() == "second"
    assert os.listdir(output.parent) == ["data"]
    assert said == []


def test_a_failure_changes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "data"
    make(output, "first", [])

    def fail() -> None:
        with claim(output, print), new_folder(output) as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (output / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["data"]


def test_leftovers_are_cleared_up(tmp_path: Path) -> None:
    output, said = tmp_path / "data", []
    (tmp_path / ".data.preparing" / "sub").mkdir(parents=True)
    make(output, "first", said)
    assert len(said) == 1
    assert "left by a run that was killed" in said[0]
    assert os.listdir(tmp_path) == ["data"]


def test_a_folder_moved_aside_comes_back(tmp_path: Path) -> None:
    output, said = tmp_path / "data", []
    make(output, "first", said)
    output.rename(tmp_path / ".data.replaced")  # killed between the two renames
    with claim(output, said.append):
        assert (output / "file").read_text() == "first"
    assert "putting" in said[0]
    assert os.listdir(tmp_path) == ["data"]


def test_a_replaced_folder_that_was_not_removed_is(tmp_path: Path) -> None:
    output = tmp_path / "data"
    make(output, "second", [])
    (tmp_path / ".data.replaced").mkdir()  # killed after both renames
    with claim(output, print):
        assert (output / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["data"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "data"
    code = (
        "import sys\nfrom pathlib import Path\nfrom motifarch.data.workspace import claim\n"
        f"with claim(Path({str(output)!r}), print):\n    print('claimed', flush=True)\n    sys.stdin.read()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another process is preparing"), claim(output, print):
            pass
        other.kill()
        other.wait()
        make(output, "mine", [])  # its claim died with it
    assert os.listdir(tmp_path) == ["data"]
