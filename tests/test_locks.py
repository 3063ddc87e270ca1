"""Lock files between processes: who is second is told who is first, and nobody dead holds one."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from motifarch.errors import UserError
from motifarch.locks import locked, share

HOLDER = """
import sys
from pathlib import Path
from motifarch.locks import locked, share
number = int(sys.argv[2])
with share(Path(sys.argv[1]), number) if number else locked(Path(sys.argv[1]), str):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, number: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that holds a lock, or one of its shares, until its input ends."""
    command = [sys.executable, "-c", HOLDER, str(path), str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def refuse(holder: str) -> str:
    return f"held by {holder}"


def test_the_second_is_told_who_is_first_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with holder(path) as process:
        with pytest.raises(UserError, match=rf"held by pid {process.pid} on \S+, since 20"), locked(path, refuse):
            pass
        process.kill()
        with locked(path, refuse, patience_s=10):
            pass
    with locked(path, refuse, remove=True):
        pass
    assert not path.exists()


def test_a_lock_is_free_only_when_its_last_share_is(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path, refuse), holder(path, 2), holder(path, 3) as last:
        pass
    with holder(path, 2) as last:
        with pytest.raises(UserError, match=f"held by pid {os.getpid()}"), locked(path, refuse):
            pass
        last.kill()
        with locked(path, refuse, patience_s=10), holder(path, 2):
            pass


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock can't be opened: it is a symbolic link"):
        locked(tmp_path / ".lock", refuse).__enter__()
    assert victim.read_text() == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="folder can't be opened"):
        locked(tmp_path / "folder", refuse).__enter__()


def test_a_file_system_without_locks_is_said_and_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said: list[str] = []
    with locked(tmp_path / ".lock", refuse, say=said.append), share(tmp_path / ".lock", 1):
        pass
    assert len(said) == 1
    assert "can't be locked (No locks available)" in said[0]
