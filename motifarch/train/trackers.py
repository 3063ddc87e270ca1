"""Where a run's figures go besides its folder: TensorBoard, Weights & Biases, Trackio."""

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from motifarch.errors import UserError
from motifarch.train.recipe import LogSection
from motifarch.train.run_folder import TENSORBOARD


class Tracker(Protocol):
    """What takes rows of metrics."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a step's row."""

    def close(self) -> None:
        """Writes what is left."""


def check_tracker(log: LogSection) -> None:
    """Refuses a tracker that is not installed.

    Raises:
        UserError: saying how to install it.
    """
    if log.tracker != "none" and find_spec(log.tracker) is None:
        raise UserError(f"log.tracker is {log.tracker}, which is not installed: pip install 'motifarch[{log.tracker}]'")


def open_trackers(log: LogSection, output: Path, *, start_step: int, recipe: Mapping[str, Any]) -> list[Tracker]:
    """Those that a recipe asks for, for a run that goes on after `start_step`.

    Raises:
        UserError: one can't be opened.
    """
    trackers: list[Tracker] = [TensorBoard(output, start_step)] if log.tensorboard else []
    if log.tracker != "none":
        trackers.append(ExperimentTracker(log, output, recipe))
    return trackers


class TensorBoard:
    """TensorBoard's event files, in a run's folder."""

    def __init__(self, output: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what an earlier start wrote past the step that this one resumes from.
        self._board = SummaryWriter(str(output / TENSORBOARD), purge_step=start_step + 1)  # type: ignore[no-untyped-call]

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a step's row."""
        for name, value in _scalars(row):
            self._board.add_scalar(name, value, row["step"])  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Writes what is left."""
        self._board.close()  # type: ignore[no-untyped-call]


class ExperimentTracker:
    """wandb or trackio, whose calls are the same; their own environment variables hold."""

    def __init__(self, log: LogSection, output: Path, recipe: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        options: dict[str, Any] = {"project": log.project, "name": output.name, "config": dict(recipe)}
        if log.tracker == "wandb":
            # The folder names the run: a resume goes on with its curves.
            name = hashlib.sha256(str(output.resolve()).encode()).hexdigest()[:12]
            options |= {"id": name, "dir": str(output)}
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trackio has no option to be silent
                self._library = importlib.import_module(log.tracker)
                self._run = self._library.init(resume="allow", **options)
        except Exception as error:  # the libraries raise many kinds, for accounts and networks
            raise UserError(
                f"log.tracker is {log.tracker}, which can't start: {error}; mend that, work without a network "
                "(WANDB_MODE=offline), or give none"
            ) from None

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes a step's row."""
        self._run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        """Writes what is left."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._library.finish()


def _scalars(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value) if v is not None)
        elif name != "step":
            yield name, value
