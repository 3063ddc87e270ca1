"""What a run measures, to `metrics.jsonl` and trackers: one row a step."""

import json
import math
import resource
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from motifarch.train.run_folder import METRICS, cut_metrics
from motifarch.train.step import StepResult
from motifarch.train.trackers import Tracker


class MetricsLog:
    """Collects device scalars and reads them together: no step waits for the device."""

    def __init__(
        self,
        output: Path,
        *,
        start_step: int,
        flops_per_token: float,
        device: torch.device,
        write: bool = True,
        begun: bool = False,
        trackers: Sequence[Tracker] = (),
        bytes_per_token: float | None = None,
    ) -> None:
        """Opens the files, cut to what `start_step` steps wrote; `begun` says that it was here.

        `flops_per_token` are the model's, forward and backward. With the text's `bytes_per_token`,
        losses are given in bits per byte too. The device's peak memory is
        reported; a CPU's is the process's resident set. Ranks that do not write only keep time.
        `warnings` says what was wrong with the file.
        """
        self.path = output / METRICS
        self.warnings: list[str] = []
        self._flops_per_token = flops_per_token
        self._device = device
        self._write = write
        self._bytes_per_token = bytes_per_token
        self._file: Any = None
        self._trackers = trackers
        if write:
            self.warnings = cut_metrics(self.path, start_step, begun=begun)
            self._file = self.path.open("a", encoding="utf-8")
        self._rows: list[dict[str, Any]] = []
        self._names: list[str] = []  # of the first scalars of a row
        self._scalars: list[torch.Tensor] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, result: StepResult, *, tokens: int, **row: Any) -> None:
        """Notes a step; `tokens` went through the model over all ranks."""
        self._rows.append(row)
        spike = torch.zeros_like(result.skipped) if result.spike is None else result.spike
        values = {
            "loss": result.loss,
            "z_loss": result.z_loss,
            "mtp_loss": result.mtp_loss,
            "expert_loss": result.expert_loss,
            "grad_norm": result.grad_norm,
            "skipped": result.skipped,
            "spike": spike,
        }
        there = {name: value.float() for name, value in values.items() if value is not None}
        self._names = list(there)
        lambdas = result.lambdas.float() if result.lambdas is not None else result.loss.new_zeros(0)
        self._scalars.append(torch.cat([torch.stack(list(there.values())), lambdas]))
        self._tokens += tokens

    def update_last(self, **values: Any) -> None:
        """Adds values to the row of the last step, which must not be flushed yet."""
        self._rows[-1].update(values)

    def update_pending(self, **values: Any) -> None:
        """Adds values to every row that is not flushed yet."""
        for row in self._rows:
            row.update(values)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps time that is not training (validation, saving) out of the speed."""
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def flush(self) -> list[dict[str, Any]]:
        """Reads the device, writes the rows noted since the last flush, and returns them."""
        if not self._rows:
            return []
        measured = torch.stack(self._scalars).tolist()
        now = time.perf_counter()
        speed = self._tokens / max(now - self._since, 1e-9)
        shared = {
            "tokens_per_second": speed,
            "model_tflops": speed * self._flops_per_token / 1e12,
            "memory_gib": peak_memory(self._device) / 2**30,
        }
        rows = []
        for row, values in zip(self._rows, measured, strict=True):
            read = dict(zip(self._names, values, strict=False))
            lambdas = values[len(self._names) :]
            if self._bytes_per_token:
                read["bits_per_byte"] = bits_per_byte(read["loss"], self._bytes_per_token)
            read |= {name: int(read[name]) for name in ("skipped", "spike")}
            rows.append(row | read | ({"lambda": lambdas} if lambdas else {}) | shared)
        if self._write:
            self._file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
            self._file.flush()
            for tracker in self._trackers:
                for row in rows:
                    tracker.log(row)
        self._rows, self._scalars, self._tokens, self._since = [], [], 0, now
        return rows

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        if self._file:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """A cross-entropy (nats/token) in bits for each byte of text, which tokenizers share."""
    return loss / math.log(2) / bytes_per_token


def peak_memory(device: torch.device) -> float:
    """Bytes: the allocator's peak, or on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not finite becomes null."""

    def clean(value: Any) -> Any:
        if isinstance(value, list):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: clean(value) for name, value in row.items()}
