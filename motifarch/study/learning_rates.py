"""The learning rate of each variant at each size: given, the best of a sweep at the smallest size,
or carried over.
"""

import math
from collections.abc import Sequence
from typing import Any

from motifarch.study.grid import Grid
from motifarch.study.matching import Matched
from motifarch.study.runs import RESULT, Run

Rates = dict[str, dict[str, dict[str, Any]]]
"""Size -> variant -> "learning_rate", "learning_rate_from" and, of a swept one,
"learning_rate_at_edge".
"""


def smallest_size(matched: Sequence[Matched]) -> str:
    """The size with the fewest parameters, where rates are swept."""
    return min(matched, key=lambda m: m.costs.parameters).size.name


def given_rates(grid: Grid, matched: Sequence[Matched]) -> Rates:
    """Rates where none are swept."""
    rate = grid.learning_rate.given
    assert rate is not None
    rates: Rates = {}
    for m in matched:
        _carry_over(grid, rates, matched, m, rate, "given")
    return rates


def swept_rates(grid: Grid, matched: Sequence[Matched], sweep: Sequence[Run]) -> Rates:
    """The rate of the lowest validation loss for each variant; variants none of whose runs finished
    are left out.

    Args:
        grid: the study.
        matched: all variants at all sizes.
        sweep: the runs at the smallest size, none of them still to be run.
    """
    rates: Rates = {}
    for name in dict.fromkeys(run.matched.name for run in sweep):
        tried = [run for run in sweep if run.matched.name == name]
        finished = {run.learning_rate: run.read(RESULT)["validation_loss"] for run in tried if run.status == "finished"}
        if not finished:
            continue
        best = min(finished, key=lambda rate: finished[rate])
        edge = best in (min(grid.learning_rate.sweep), max(grid.learning_rate.sweep))
        for m in matched:
            if m.name == name:
                _carry_over(grid, rates, matched, m, best, "swept")
                rates[m.size.name][name]["learning_rate_at_edge"] = edge
    return rates


def _carry_over(grid: Grid, rates: Rates, matched: Sequence[Matched], to: Matched, rate: float, origin: str) -> None:
    """Sets a variant's rate at a size, from the smallest size's."""
    smallest = next(m.size for m in matched if m.size.name == smallest_size(matched))
    inverse = grid.learning_rate.transfer == "inverse_width"
    factor = smallest.hidden_size / to.size.hidden_size if inverse else 1.0
    carried = to.size.name != smallest.name and (origin == "swept" or not math.isclose(factor, 1.0))
    entry = {"learning_rate": rate * factor, "learning_rate_from": "transferred" if carried else origin}
    rates.setdefault(to.size.name, {})[to.name] = entry
