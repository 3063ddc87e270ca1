"""A limit on the time that Python code of others may take."""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTimeError(Exception):
    """The block took longer than its limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends a block of Python code that takes longer, in whichever thread it runs.

    Raises:
        OutOfTimeError: from within the block.
    """
    thread, lock, done = threading.get_ident(), threading.Lock(), False

    def end() -> None:
        with lock:
            if not done:
                # A signal would reach the main thread alone, and take others' timers away.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(OutOfTimeError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
