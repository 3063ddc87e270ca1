"""The line ends with the work it shows."""

import io
import sys
import threading

import multiprocess
import pytest

from motifarch.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("total", [None, 9])
def test_nothing_of_it_outlives_an_error(
    stream: type[io.StringIO], total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="full"), progress("working", total) as advance:  # noqa: PT012
        advance()
        raise OSError("disk full")
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in left)


def test_it_shows_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress("working", 9) as advance:
            advance(9)
        assert ("working" in stream.getvalue()) == stream.isatty()
        assert ("9/9" in stream.getvalue()) == stream.isatty()


def test_of_two_the_outer_one_shows_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with progress("outer", 9) as advance:
        advance(2)
        with progress("inner", 5) as inner:
            inner(5)
        advance()
    assert "3/9" in screen.getvalue()
    assert "inner" not in screen.getvalue()


def test_forked_processes_move_it_on(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = terminal(monkeypatch)
    with progress("working") as advance, multiprocess.get_context("fork").Pool(2) as pool:
        pool.map(advance, [400, 600, 234])
    assert "1,234" in screen.getvalue()


def test_what_is_printed_meanwhile_goes_where_it_would(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    screen = terminal(monkeypatch)
    with progress("working"):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in screen.getvalue()
