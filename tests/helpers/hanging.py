"""A test that waits for a forked child, which ends no more than it does."""

import os
import time


def test_that_waits() -> None:
    if os.fork() == 0:
        time.sleep(1000)
    os.wait()
    time.sleep(1000)


def test_after_it() -> None:
    pass
