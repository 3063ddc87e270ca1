"""The signals that ask a run to stop: noted, and acted on between steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Those of terminals (HUP, INT) and of clusters whose time is up (TERM, USR1, USR2, XCPU)."""


class StopSignals:
    """While open, the signals only set `received`, however often they come; a SIGHUP that nohup has
    made this process ignore stays ignored.
    """

    received: int = 0

    def __enter__(self) -> "StopSignals":
        """Takes the signals over."""
        taken = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._note) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def flags(self) -> list[int]:
        """One number for each of SIGNALS, 1 where it was received, for the ranks to add up."""
        return [int(self.received == number) for number in SIGNALS]
