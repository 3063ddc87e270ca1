"""The live line of a run, and plain lines where there is no terminal."""

import math
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from motifarch.counted import counted


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

    def update(self, rows: Sequence[dict[str, Any]]) -> None:
        """Shows the metrics since the last time: means of losses, and the last of the rest."""
        if not self._show:
            return
        line = Text(self._line(rows[-1] | means(rows)))
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
        if "bits_per_byte" in row:
            parts[1] += f" ({row['bits_per_byte']:.3f} bits/byte)"
        if "validation_loss" in row:
            parts.insert(2, f"validation {row['validation_loss']:.4f}")
        if row["skipped_total"]:
            parts.append(f"{counted(row['skipped_total'], 'step')} skipped")
        return " · ".join(parts)

    def close(self) -> None:
        """Leaves the last live line standing."""
        if self._live:
            self._live.stop()
            self._live = None


def means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means of the rows' losses, of those that are finite; NaN where none is."""
    found = {}
    for name in ("loss", "bits_per_byte"):
        values = [row[name] for row in rows if isinstance(row.get(name), float) and math.isfinite(row[name])]
        if values or name in rows[-1]:
            found[name] = math.fsum(values) / len(values) if values else math.nan
    return found


def outcome(rows: Sequence[dict[str, Any]], window: int) -> list[str]:
    """What a run came to, in lines: the mean training loss of so many last steps, and the last
    validation loss.
    """
    last = rows[-window:]
    lines = []
    if last and "loss" in (mean := means(last)):
        steps = f"mean of the last {len(last)} steps" if len(last) > 1 else "of the last step"
        lines.append(f"loss {_with_bits(mean['loss'], mean.get('bits_per_byte'))}, {steps}")
    validated = [row for row in rows if row.get("validation_loss") is not None]
    if validated:
        row = validated[-1]
        value = _with_bits(row["validation_loss"], row.get("validation_bits_per_byte"))
        lines.append(f"validation loss {value}, after step {row['step']}")
    return lines


def _with_bits(loss: float, bits: float | None) -> str:
    return f"{loss:.4f} nats/token" + (f" ({bits:.3f} bits per byte)" if bits is not None else "")


def duration(seconds: float) -> str:
    """Seconds in words: 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
