"""Files and folders appear complete or not at all."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from motifarch.errors import UserError
from motifarch.files import (
    atomic_write,
    claim_folder,
    new_folder,
    read_sealed_json,
    sha256,
    write_json,
    write_sealed_json,
)


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


def test_a_link_to_a_folder_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk" / "data").mkdir(parents=True)
    link = tmp_path / "link"
    for behind in ("data", "new"):  # an empty folder, and one that is not there yet
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / "disk" / behind)
        for content in ("first", "second"):
            make(link, content, [])
            assert link.is_symlink()
            assert (tmp_path / "disk" / behind / "file").read_text() == content
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]
    assert sorted(os.listdir(tmp_path / "disk")) == ["data", "new"]


@pytest.mark.parametrize("name", [".data.lock", ".data.preparing", ".data.replaced"])
def test_a_link_under_a_name_of_our_own_is_never_followed(tmp_path: Path, name: str) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("years of work")
    (tmp_path / "data").mkdir()
    (tmp_path / name).symlink_to(mine / "letter" if name.endswith("lock") else mine)
    if name.endswith("lock"):
        with pytest.raises(UserError, match="is a symbolic link; remove it"):
            make(tmp_path / "data", "content", [])
    else:
        make(tmp_path / "data", "content", [])
        assert (tmp_path / "data" / "file").read_text() == "content"
        assert not (tmp_path / name).is_symlink()
    assert (mine / "letter").read_text() == "years of work"
    assert os.listdir(mine) == ["letter"]


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    make(tmp_path / "data", "first", [])

    def fill(error: BaseException) -> None:
        with claim_folder(tmp_path / "data", print), new_folder(tmp_path / "data"):
            raise error

    # As Python, safetensors and torch say it.
    hidden = RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
    hidden.__context__ = OSError(errno.ENOSPC, "No space left on device")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/elsewhere/file")
    for error in (full, hidden, ValueError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(UserError, match=r"data can't be written \(No space left on device\): free some space"):
            fill(error)
    with pytest.raises(FileNotFoundError):  # of something that is read
        fill(FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/source"))
    with pytest.raises(UserError, match=r"file/data can't be written \(File exists\)"):
        make(tmp_path / "data" / "file" / "data", "", [])
    assert (tmp_path / "data" / "file").read_text() == "first"
    assert os.listdir(tmp_path) == ["data"]


def test_any_change_of_a_sealed_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = {"format": 2, "ü": [1, 0.1, None, {"b": "c\n"}], "nan": [1e-300, -0.0]}
    write_sealed_json(path, content)
    assert read_sealed_json(path, unsealed=("format", 1)) == content
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 6):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(ValueError, match=r"."):
                read_sealed_json(path, unsealed=("format", 1))
    for other in (
        b"",
        b"[]",
        b"null",
        b"[" * 100_000,
        whole[:-3],
        whole + b" ",
        whole.replace(b'"format": 2', b'"format": 1'),
    ):
        path.write_bytes(other)
        with pytest.raises(ValueError, match=r"."):
            read_sealed_json(path, unsealed=("format", 1))
    path.write_text('{"format": 1}')  # from before there was a hash
    assert read_sealed_json(path, unsealed=("format", 1)) == {"format": 1}


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
