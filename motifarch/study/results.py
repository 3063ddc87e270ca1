"""What a study found: each run's result from its files, and all of them joined."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from motifarch.errors import UserError
from motifarch.files import write_json
from motifarch.study.folder import FORMAT, KIND, RESULTS, StudyFolder
from motifarch.study.matching import TOLERANCE, Matched
from motifarch.study.runs import FAILED, MEASURED, RESULT, Run
from motifarch.study.variants import head_ratio
from motifarch.train.metrics import METRICS, read_metrics

CURVE_POINTS = 200


def run_result(run: Run, tokens_per_step: int) -> dict[str, Any]:
    """A finished run's result: its curve, its losses, and what was measured.

    Seconds are those of training steps alone, summed over resumes; validation, saving and starting
    are left out.

    Raises:
        UserError: it did not come to a finite validation loss.
    """
    rows = read_metrics(run.folder / METRICS)
    seconds = list(accumulate(tokens_per_step / row["tokens_per_second"] for row in rows))
    at = {
        row["step"]: (row["step"] * tokens_per_step, round(second, 3))
        for row, second in zip(rows, seconds, strict=True)
    }
    validation = [[*at[row["step"]], row["validation_loss"]] for row in rows if row.get("validation_loss")]
    if not rows or rows[-1]["step"] != run.steps:
        raise UserError(f"its {METRICS} ends after step {rows[-1]['step'] if rows else 0} of {run.steps}")
    if rows[-1].get("validation_loss") is None:
        raise UserError("its last validation loss is not finite: it diverged")
    result = {
        "steps": run.steps,
        "tokens": run.steps * tokens_per_step,
        "learning_rate": run.learning_rate,
        "curve": _curve(rows, at),
        "validation": validation,
        "validation_loss": rows[-1]["validation_loss"],
    }
    return result if run.sweep else result | run.read(MEASURED)


def _curve(rows: Sequence[dict[str, Any]], at: dict[int, tuple[int, float]]) -> list[list[Any]]:
    """At most CURVE_POINTS stretches of steps: (tokens, seconds) at the end, mean loss, largest
    gradient norm.
    """
    length = -(-len(rows) // CURVE_POINTS)
    points = []
    for first in range(0, len(rows), length):
        part = rows[first : first + length]
        # What was not finite is null in the metrics: such a step was skipped.
        losses = [row["loss"] for row in part if row["loss"] is not None]
        norms = [row["grad_norm"] for row in part if row["grad_norm"] is not None]
        mean = float(f"{math.fsum(losses) / len(losses):.6g}") if losses else None
        points.append([*at[part[-1]["step"]], mean, float(f"{max(norms):.6g}") if norms else None])
    return points


def join(study: StudyFolder, variants: Sequence[Matched], runs: Sequence[Run], sweep: Sequence[Run]) -> dict[str, Any]:
    """Joins what is there and writes results.json.

    Args:
        study: the folder, which knows the learning rates chosen so far.
        variants: all of them, at all sizes.
        runs: those to compare, finished or not, as far as their learning rates are known.
        sweep: those that try learning rates.
    """
    grid, rates = study.grid, study.content.get("learning_rates", {})
    joined = {
        "kind": KIND,
        "format": FORMAT,
        "command": study.content["starts"][-1]["command"],
        "environment": study.content["starts"][-1],
        "starts": study.content["starts"],
        "grid": grid,
        "matching": {"by": grid["match"], "tolerance": TOLERANCE, "reference": study.content["reference"]},
        "data": study.content["data"],
        "compute": study.content["compute"],
        "variants": [_variant(m, grid["match"], rates.get(m.size.name, {}).get(m.name)) for m in variants],
        "sweep": [
            {"variant": r.matched.name, "size": r.matched.size.name, "seed": r.seed, "learning_rate": r.learning_rate}
            | _outcome(r)
            for r in sweep
        ],
        "runs": [{"variant": r.matched.name, "size": r.matched.size.name, "seed": r.seed} | _outcome(r) for r in runs],
    }
    write_json(study.path / RESULTS, joined)
    return joined


def _variant(matched: Matched, by: Any, rate: dict[str, Any] | None) -> dict[str, Any]:
    costs = matched.costs
    return {
        "name": matched.name,
        "size": matched.size.name,
        "attention": matched.variant.attention,
        "ratio": head_ratio(matched.variant),
        "activation": matched.variant.activation,
        "model": matched.model,
        "parameters": costs.parameters,
        "training_flops_per_token": costs.flops,
        "kv_bytes_per_token": costs.kv_cache,
        "deviation": matched.deviations[by],
        "deviations": matched.deviations,
        **(rate or {"learning_rate": None, "learning_rate_from": None}),
    }


def _outcome(run: Run) -> dict[str, Any]:
    """A run's state and, where it has one, its result."""
    status = run.status
    if status == "finished":
        result = run.read(RESULT)
        if run.sweep:
            result = {name: result[name] for name in ("steps", "tokens", "validation_loss")}
        return {"status": status, "error": None} | result
    error = run.read(FAILED)["error"] if status == "failed" else None
    return {"status": status, "error": error, "steps": run.steps}
