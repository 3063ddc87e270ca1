"""The bar ends with the work it shows."""

import io
import sys
import threading

import pytest

from motifarch.data.progress import bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_of_it_outlives_an_error(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="full"), bar(range(9), "working") as items:  # noqa: PT012
        for item in items:
            if item == 2:
                raise OSError("disk full")
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(timeout=20)
    assert not any(thread.is_alive() for thread in left)


def test_it_shows_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        with bar(iter(range(9)), "working", total=9) as items:
            assert list(items) == list(range(9))
        assert ("working" in stream.getvalue()) == stream.isatty()
