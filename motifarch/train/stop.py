"""SIGTERM and Ctrl-C: noted, and acted on between steps."""

import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """While open, SIGINT and SIGTERM only set `received`, however often they come."""

    received: int = 0

    def __enter__(self) -> "StopSignals":
        """Takes the signals over."""
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
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
