"""What a run measures, to `metrics.jsonl` and TensorBoard: one row a step."""

import json
import math
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from motifarch.errors import UserError
from motifarch.files import atomic_write, free_name
from motifarch.train.step import StepResult

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


def read_metrics(path: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file: objects with a whole `step`, and numbers, nulls or lists of them.

    Lines that hold none are left out; `broken` gets a note of each, but of a last one that a crash
    has cut short.

    Raises:
        UserError: the file can't be read.
    """
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); mend that, or move it away") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            rows.append(row)
        elif broken is not None and number < len(lines):  # all but the last end with a newline
            broken.append(f"line {number}")
    return rows


def _is_row(row: Any) -> bool:
    def is_number(value: Any) -> bool:
        return value is None or isinstance(value, int | float)

    return (
        isinstance(row, dict)
        and type(row.get("step")) is int
        and all(is_number(v) or (isinstance(v, list) and all(map(is_number, v))) for v in row.values())
    )


def cut_metrics(path: Path, step: int, *, begun: bool = False) -> list[str]:
    """Removes the rows after a step, which a resumed run is about to write again.

    `begun` says that the run wrote rows here before.

    Returns:
        What to say of others: lines that were broken, of which a copy of the file is kept, and rows
        that are missing.
    """
    if not os.path.lexists(path):
        return [f"{path} is missing, and with it the rows of the steps to {step}"] if begun else []
    broken: list[str] = []
    kept = [row for row in read_metrics(path, broken) if row["step"] <= step]
    said = []
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        copy = free_name(path)
        shutil.copyfile(path, copy)
        said = [f"{path} has broken lines ({', '.join(broken[:3])}{more}), left out; the file as it was is {copy.name}"]
    # A run that branched off another's checkpoint begins with a later row than the first.
    first = min((row["step"] for row in kept), default=1)
    if missing := step + 1 - first - len({row["step"] for row in kept}):
        said.append(f"{path} lacks the rows of {missing} of the steps {first} to {step}")
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
    return said


class MetricsLog:
    """Collects device scalars and reads them together: no step waits for the device."""

    def __init__(
        self,
        output: Path,
        *,
        start_step: int,
        flops_per_token: float,
        tensorboard: bool,
        device: torch.device,
        write: bool = True,
        begun: bool = False,
    ) -> None:
        """Opens the files, cut to what `start_step` steps wrote; `begun` says that it was here.

        `flops_per_token` are the model's, forward and backward. The device's peak memory is
        reported; a CPU's is the process's resident set. Ranks that do not write only keep time.
        `warnings` says what was wrong with the file.
        """
        self.path = output / METRICS
        self.warnings: list[str] = []
        self._flops_per_token = flops_per_token
        self._device = device
        self._write = write
        self._file: Any = None
        self._board: Any = None
        if write:
            self.warnings = cut_metrics(self.path, start_step, begun=begun)
            self._file = self.path.open("a", encoding="utf-8")
            if tensorboard:
                from torch.utils.tensorboard import SummaryWriter

                # Readers drop what an earlier start wrote past the step that this one resumes from.
                self._board = SummaryWriter(str(output / TENSORBOARD), purge_step=start_step + 1)
        self._rows: list[dict[str, Any]] = []
        self._scalars: list[torch.Tensor] = []
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, result: StepResult, *, tokens: int, **row: Any) -> None:
        """Notes a step; `tokens` went through the model over all ranks."""
        self._rows.append(row)
        spike = torch.zeros_like(result.skipped) if result.spike is None else result.spike
        values = [result.loss, result.z_loss, result.grad_norm, result.skipped, spike]
        lambdas = result.lambdas.float() if result.lambdas is not None else result.loss.new_zeros(0)
        self._scalars.append(torch.cat([torch.stack([v.float() for v in values]), lambdas]))
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
        for row, (loss, z_loss, grad_norm, skipped, spike, *lambdas) in zip(self._rows, measured, strict=True):
            read = {"loss": loss, "z_loss": z_loss, "grad_norm": grad_norm}
            read |= {"skipped": int(skipped), "spike": int(spike)}
            rows.append(row | read | ({"lambda": lambdas} if lambdas else {}) | shared)
        if self._write:
            self._file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
            self._file.flush()
            for row in rows if self._board else []:
                self._write_board(row)
        self._rows, self._scalars, self._tokens, self._since = [], [], 0, now
        return rows

    def _write_board(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if isinstance(value, list):
                for i, v in enumerate(value):
                    self._board.add_scalar(f"{name}/{i}", v, row["step"])
            elif name != "step":
                self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flushes and closes the files."""
        self.flush()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()


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
