"""The live line of a run, and plain lines where there is no terminal."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text


class Progress:
    """Shows how a run goes; on ranks other than 0, nothing."""

    def __init__(self, steps: int, start_step: int, show: bool = True) -> None:
        """Starts the clock for the time left of `steps`, of which `start_step` are done."""
        self.steps = steps
        self._show = show
        self._console = Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._first = (start_step, time.monotonic())
        if show and self._console.is_terminal:
            self._live = Live(Text("waiting for the first step"), console=self._console, refresh_per_second=4)
            self._live.start()

    def say(self, message: str) -> None:
        """Prints a line, above the live one."""
        if self._show:
            self._console.print(Text(message))

    def update(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics."""
        if not self._show:
            return
        line = Text(self._line(row))
        if self._live:
            self._live.update(line)
        else:
            self._console.print(line)

    def _line(self, row: dict[str, Any]) -> str:
        step = row["step"]
        first, since = self._first
        seconds = (time.monotonic() - since) / max(step - first, 1) * (self.steps - step)
        parts = [
            f"step {step:>{len(str(self.steps))}}/{self.steps}",
            f"loss {row['loss']:.4f}",
            f"lr {row['learning_rate']:.2e}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
            f"{duration(seconds)} left",
        ]
        if "validation_loss" in row:
            parts.insert(2, f"validation {row['validation_loss']:.4f}")
        if row["skipped_total"]:
            parts.append(f"{row['skipped_total']} steps skipped")
        return " · ".join(parts)

    def close(self) -> None:
        """Leaves the last live line standing."""
        if self._live:
            self._live.stop()
            self._live = None


def duration(seconds: float) -> str:
    """Seconds in words: 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
