"""A run's folder: the record of what was run, `run.json`, and its figures, `metrics.jsonl`."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from motifarch.errors import UserError
from motifarch.files import atomic_write, free_name, read_json, write_json

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
RECORD = "run.json"
_TAIL = 1 << 20
"""Bytes of metrics that are read at first where the last rows are wanted."""
LOCK = ".lock"
"""The file in a run's folder that the run holds locked."""
ENDED = "ended"
"""The field of a record that says how a run ended, "complete" or "stopped"; a start removes it."""


def read_metrics(path: Path, broken: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a metrics file: objects with a whole `step`, and numbers, nulls or lists of them.

    Lines that hold none are left out; `broken` gets a note of each, but of a last one that a crash
    has cut short.

    Raises:
        UserError: the file can't be read.
    """
    lines = _read(path).split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif broken is not None and number < len(lines):  # all but the last end with a newline
            broken.append(f"line {number}")
    return rows


def last_metrics(path: Path, first: int) -> list[dict[str, Any]]:
    """The rows at a metrics file's end, from a step on at least; little more of it is read.

    Raises:
        UserError: the file can't be read.
    """
    size = path.stat().st_size if path.exists() else 0
    read = min(size, _TAIL)
    while True:
        lines = _read(path, size - read).split(b"\n")
        if read < size:
            del lines[0]  # cut off
        rows = [row for line in lines if (row := _row(line)) is not None]
        if read == size or (rows and rows[0]["step"] < first):
            return rows
        read = min(size, 4 * read)


def _read(path: Path, start: int = 0) -> bytes:
    try:
        if not path.exists():
            return b""
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); mend that, or move it away") from None


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's row, if it holds one."""
    try:
        row: dict[str, Any] = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if _is_row(row) else None


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


def read_record(output: Path) -> dict[str, Any]:
    """Reads a run's record; empty where there is none or it can't be read."""
    try:
        record = read_json(output / RECORD)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def set_damaged_record_aside(output: Path) -> list[str]:
    """Keeps a record that can't be read under another name, for the run is about to write its own.

    Returns:
        A line that says so; empty where there is none, or it can be read.
    """
    path = output / RECORD
    if not os.path.lexists(path) or isinstance(read_record(output).get("starts"), list):
        return []
    aside = free_name(path)
    path.rename(aside)
    return [f"{path} can't be read, and is kept as {aside.name}; the record begins anew"]


def note_end(output: Path, how: str) -> None:
    """Notes in a run's record how it ended: "complete" or "stopped"."""
    if record := read_record(output):
        write_json(output / RECORD, record | {ENDED: how})
