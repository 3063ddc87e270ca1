"""A run of a study: its folder, its recipe, its learning rate, and what came of it."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from motifarch.errors import UserError
from motifarch.files import write_json
from motifarch.study.grid import Grid, SizeSpec
from motifarch.study.learning_rate import optimum
from motifarch.study.matching import Matched
from motifarch.train.recipe import DatasetEntry, Recipe
from motifarch.train.run_folder import METRICS, read_metrics

RESULT, FAILED, RECIPE, MEASURED = "result.json", "failed.json", "recipe.yaml", "measured.json"
_CURVE_POINTS = 200

Rates = dict[str, dict[str, dict[str, Any]]]
"""Size -> variant -> "learning_rate", its "..._from" and, of a swept one, "..._at_edge" and, of one
that was fitted, "..._interval"."""


@dataclass(frozen=True)
class Run:
    """One training run; what is known of it is in its folder."""

    matched: Matched
    seed: int
    steps: int
    learning_rate: float
    """NaN where it is not chosen yet."""
    folder: Path
    sweep: bool = False
    """Whether it only tries a learning rate: it is not measured afterwards."""

    @property
    def label(self) -> str:
        """Its name in what is printed."""
        what = f"lr {self.learning_rate:g}" if self.sweep else f"seed {self.seed}"
        return f"{self.matched.name} · {self.matched.size.name} · {what}"

    @property
    def status(self) -> Literal["finished", "failed", "missing"]:
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

    def fail(self, stage: str, error: str, status: int, log_tail: Sequence[str] = ()) -> None:
        """Writes that it failed; checkpoints stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"stage": stage, "error": error, "status": status, "log_tail": list(log_tail)}
        write_json(self.folder / FAILED, about)

    def steps_done(self) -> int:
        """Steps that its metrics hold, read from the file's end."""
        try:
            with (self.folder / METRICS).open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 8192))
                steps = re.findall(rb'"step": (\d+)[,}]', file.read())
        except OSError:
            return 0
        return int(steps[-1]) if steps else 0

    def outcome(self) -> dict[str, Any]:
        """Its row of results.json: what it was, its state and, where it has one, its result."""
        row: dict[str, Any] = {"variant": self.matched.name, "size": self.matched.size.name, "seed": self.seed}
        if self.sweep:
            row["learning_rate"] = self.learning_rate
        status = self.status
        if status != "finished":
            error = self.read(FAILED)["error"] if status == "failed" else None
            return row | {"status": status, "error": error, "steps": self.steps}
        result = self.read(RESULT)
        if self.sweep:
            result = {name: result[name] for name in ("steps", "tokens", "validation_loss")}
        return row | {"status": status, "error": None} | result


def run_recipe(grid: Grid, run: Run, compute: Literal["auto", "float32", "bfloat16"], attention: Any = None) -> Recipe:
    """The recipe of a run: the grid's, with what the study decides.

    Args:
        grid: the study.
        run: which.
        compute: its precision.
        attention: the attn_implementation of softmax attention where the grid names none.
    """
    recipe, full = grid.recipe, grid.steps(run.matched.size)
    optim = dataclasses.replace(recipe.optim, lr=run.learning_rate)
    # A shorter run has a shorter warm-up and decay.
    optim.warmup_steps = round(optim.warmup_steps * run.steps / full)
    if optim.decay_steps is not None:
        optim.decay_steps = round(optim.decay_steps * run.steps / full)
    return dataclasses.replace(
        with_model(recipe, run.matched, attention),
        run=dataclasses.replace(recipe.run, output=str(run.folder), steps=run.steps, seed=run.seed),
        data=dataclasses.replace(recipe.data, datasets=[DatasetEntry(grid.data.path)]),
        optim=optim,
        precision=dataclasses.replace(recipe.precision, compute=compute),
    )


def with_model(recipe: Recipe, matched: Matched, attention: Any) -> Recipe:
    """A grid's recipe with a variant's model; softmax attention takes the attn_implementation."""
    model = dataclasses.replace(recipe.model, **matched.model)
    if matched.variant.is_softmax:
        model.attn_implementation = model.attn_implementation or attention
    return dataclasses.replace(recipe, model=model)


def run_result(run: Run, tokens_per_step: int) -> dict[str, Any]:
    """A finished run's result: its curve, its losses, and what was measured.

    Seconds are those of training steps alone, summed over resumes.

    Raises:
        UserError: it did not come to a finite validation loss.
    """
    rows = read_metrics(run.folder / METRICS)
    if not rows or rows[-1]["step"] != run.steps:
        raise UserError(f"its {METRICS} ends after step {rows[-1]['step'] if rows else 0} of {run.steps}")
    if rows[-1].get("validation_loss") is None:
        raise UserError("its last validation loss is not finite: it diverged")
    seconds = accumulate(tokens_per_step / row["tokens_per_second"] for row in rows)
    at = [(row["step"] * tokens_per_step, round(second, 3)) for row, second in zip(rows, seconds, strict=True)]
    # At most so many stretches: (tokens, seconds) at the end, mean loss, largest gradient norm.
    length = -(-len(rows) // _CURVE_POINTS)
    curve = []
    for first in range(0, len(rows), length):
        part = rows[first : first + length]
        # What was not finite is null in the metrics: such a step was skipped.
        losses, norms = ([row[name] for row in part if row[name] is not None] for name in ("loss", "grad_norm"))
        mean = float(f"{math.fsum(losses) / len(losses):.6g}") if losses else None
        curve.append([*at[first + len(part) - 1], mean, float(f"{max(norms):.6g}") if norms else None])
    result = {
        "steps": run.steps,
        "tokens": run.steps * tokens_per_step,
        "learning_rate": run.learning_rate,
        "curve": curve,
        "validation": [
            [*place, row["validation_loss"]] for place, row in zip(at, rows, strict=True) if row.get("validation_loss")
        ],
        "validation_loss": rows[-1]["validation_loss"],
        "validation_bits_per_byte": rows[-1].get("validation_bits_per_byte"),
    }
    return result if run.sweep else result | run.read(MEASURED)


def choose_rates(grid: Grid, matched: Sequence[Matched], smallest: SizeSpec, sweep: Sequence[Run] = ()) -> Rates:
    """The rate of each variant at each size: the one given, or the optimum of its sweep.

    None of the sweep's runs is still to be run; a variant none of whose runs finished has no rate.

    Args:
        grid: the study.
        matched: the variants whose rates are chosen.
        smallest: the size whose rates larger ones may take.
        sweep: all runs that tried rates.
    """
    rule, rates = grid.learning_rate, Rates()
    for m in matched:
        swept = m.size == smallest or rule.transfer == "sweep"
        tried = {
            run.learning_rate: float(run.read(RESULT)["validation_loss"])
            for run in sweep
            if run.matched.name == m.name
            and run.matched.size == (m.size if swept else smallest)
            and run.status == "finished"
        }
        if rule.sweep and not tried:
            continue
        best = optimum(tried) if tried else None
        rate = best.rate if best else rule.given
        assert rate is not None
        factor = smallest.hidden_size / m.size.hidden_size if rule.transfer == "inverse_width" else 1.0
        carried = not swept and (best is not None or factor != 1)
        origin = "transferred" if carried else "swept" if best else "given"
        entry: dict[str, Any] = {"learning_rate": rate * factor, "learning_rate_from": origin}
        if best:
            entry["learning_rate_at_edge"] = best.at_edge
            if best.fitted:
                entry["learning_rate_interval"] = [_or_none(end, factor) for end in (best.low, best.high)]
        rates.setdefault(m.size.name, {})[m.name] = entry
    return rates


def _or_none(end: float | None, factor: float) -> float | None:
    """An end of an interval, as JSON can hold it: null where there is none."""
    return end * factor if end is not None and 0 < end < math.inf else None
