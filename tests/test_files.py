"""Files and folders appear complete or not at all."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from motifarch.errors import UserError
from motifarch.files import atomic_write, claim_folder, new_folder, sha256, write_json


def make(output: Path, content: str, said: list[str]) -> None:
    with claim_folder(output, said.append), new_folder(output) as folder:
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
        with claim_folder(output, print), new_folder(output) as folder:
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
    with claim_folder(output, said.append):
        assert (output / "file").read_text() == "first"
    assert "putting" in said[0]
    assert os.listdir(tmp_path) == ["data"]


def test_a_replaced_folder_that_was_not_removed_is(tmp_path: Path) -> None:
    output = tmp_path / "data"
    make(output, "second", [])
    (tmp_path / ".data.replaced").mkdir()  # killed after both renames
    with claim_folder(output, print):
        assert (output / "file").read_text() == "second"
    assert os.listdir(tmp_path) == ["data"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    output = tmp_path / "data"
    code = (
        "import sys\nfrom pathlib import Path\nfrom motifarch.files import claim_folder\n"
        f"with claim_folder(Path({str(output)!r}), print):\n    print('claimed', flush=True)\n    sys.stdin.read()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="another process is preparing"), claim_folder(output, print):
            pass
        other.kill()
        other.wait()
        make(output, "mine", [])  # its claim died with it
    assert os.listdir(tmp_path) == ["data"]


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text)


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "ü"]})
    assert json.loads(path.read_text()) == {"a": [1, "ü"]}
    write(path, "ü")
    assert path.read_bytes() == "ü".encode()
    with atomic_write(path, binary=True) as file:
        file.write(b"\0")
    assert path.read_bytes() == b"\0"
    assert sha256(path) == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, "old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write(path, "old")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


def test_permissions_are_those_that_open_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "new", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write(tmp_path / "new", "again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "there" / "file")
    for text in ("first", "second"):  # the link dangles at first
        write(link, text)
        assert link.is_symlink()
        assert (tmp_path / "there" / "file").read_text() == text
    assert os.listdir(tmp_path / "there") == ["file"]


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    write(Path(f"/proc/self/fd/{writer}"), "through")
    os.close(writer)
    with open(reader) as file:
        assert file.read() == "through"


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        write(tmp_path / "nowhere" / "a", "")
    assert caught.value.filename == str(tmp_path / "nowhere" / "a")
    with pytest.raises(IsADirectoryError):
        write(tmp_path, "")
