"""The runs of a study: a folder and a recipe for each, and how far it has come."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from motifarch.files import write_json
from motifarch.study.grid import Grid, model_section
from motifarch.study.matching import Matched
from motifarch.train.metrics import METRICS
from motifarch.train.recipe import DatasetEntry, Recipe

RESULT, FAILED, RECIPE, MEASURED = "result.json", "failed.json", "recipe.yaml", "measured.json"
Status = Literal["finished", "failed", "missing"]


@dataclass(frozen=True)
class Run:
    """One training run."""

    matched: Matched
    seed: int
    steps: int
    learning_rate: float
    folder: Path
    sweep: bool = False
    """Whether it only tries a learning rate: it is not measured afterwards."""

    @property
    def label(self) -> str:
        """For people."""
        what = f"lr {self.learning_rate:g}" if self.sweep else f"seed {self.seed}"
        return f"{self.matched.name} · {self.matched.size.name} · {what}"

    @property
    def work(self) -> float:
        """What a step costs, by which the time left is estimated."""
        return self.matched.costs.flops

    @property
    def status(self) -> Status:
        """What its folder says."""
        if (self.folder / RESULT).is_file():
            return "finished"
        return "failed" if (self.folder / FAILED).is_file() else "missing"

    def read(self, name: str) -> dict[str, Any]:
        """One of its JSON files."""
        return json.loads((self.folder / name).read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def finish(self, result: dict[str, Any]) -> None:
        """Writes what came of it, last of all."""
        write_json(self.folder / RESULT, result)
        (self.folder / FAILED).unlink(missing_ok=True)

    def fail(self, stage: str, error: str, status: int, log_tail: list[str]) -> None:
        """Writes that it failed; checkpoints stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / FAILED, {"stage": stage, "error": error, "status": status, "log_tail": log_tail})

    def forget_failure(self) -> None:
        """Lets a failed run be tried again; it resumes from its newest checkpoint."""
        (self.folder / FAILED).unlink(missing_ok=True)

    def steps_done(self) -> int:
        """Steps that its metrics speak of, read from the file's end."""
        try:
            with (self.folder / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 8192))
                lines = file.read().splitlines()
        except OSError:
            return 0
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue  # cut short by the file's being written, or by where reading began
        return 0


def main_run(grid: Grid, study: Path, matched: Matched, seed: int, learning_rate: float) -> Run:
    """A run that is compared."""
    folder = study / "runs" / matched.size.name / matched.variant.folder / f"seed_{seed}"
    return Run(matched, seed, grid.steps(matched.size), learning_rate, folder)


def sweep_run(grid: Grid, study: Path, matched: Matched, learning_rate: float) -> Run:
    """A run that tries a learning rate."""
    folder = study / "sweep" / matched.variant.folder / f"lr_{learning_rate:g}"
    tokens = grid.learning_rate.tokens or max(1, (matched.size.tokens or grid.tokens) // 4)
    return Run(matched, grid.seeds[0], grid.steps(matched.size, tokens), learning_rate, folder, sweep=True)


def run_recipe(grid: Grid, run: Run, compute: Literal["auto", "float32", "bfloat16"]) -> Recipe:
    """The recipe of a run: the grid's, with what the study decides.

    Args:
        grid: the study.
        run: which one.
        compute: the precision of all of the study's runs.
    """
    recipe, full = grid.recipe, grid.steps(run.matched.size)
    optim = dataclasses.replace(recipe.optim, lr=run.learning_rate)
    if run.steps != full:  # a shorter run has a shorter warm-up and decay
        optim.warmup_steps = round(optim.warmup_steps * run.steps / full)
        if optim.decay_steps is not None:
            optim.decay_steps = round(optim.decay_steps * run.steps / full)
    return dataclasses.replace(
        recipe,
        run=dataclasses.replace(recipe.run, output=str(run.folder), steps=run.steps, seed=run.seed),
        model=model_section(grid, run.matched.model),
        data=dataclasses.replace(recipe.data, datasets=[DatasetEntry(grid.data.path)]),
        optim=optim,
        precision=dataclasses.replace(recipe.precision, compute=compute),
    )
