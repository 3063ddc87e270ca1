"""Each variant's learning rate at each size: given, swept or carried over."""

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


def choose_rates(grid: Grid, matched: Sequence[Matched], sweep: Sequence[Run] = ()) -> Rates:
    """The rate of each variant at each size: the one given, or the best of its sweep.

    Args:
        grid: the study.
        matched: all variants at all sizes.
        sweep: the runs at the smallest size, none of them still to be run; a variant none of whose
            runs finished has no rate.
    """
    smallest = next(m.size for m in matched if m.size.name == smallest_size(matched))
    rule, rates = grid.learning_rate, Rates()
    for m in matched:
        tried = [run for run in sweep if run.matched.name == m.name and run.status == "finished"]
        if rule.sweep and not tried:
            continue
        best = min(tried, key=lambda run: float(run.read(RESULT)["validation_loss"]), default=None)
        rate = best.learning_rate if best else rule.given
        assert rate is not None
        factor = smallest.hidden_size / m.size.hidden_size if rule.transfer == "inverse_width" else 1.0
        carried = m.size.name != smallest.name and (best is not None or factor != 1)
        origin = "transferred" if carried else "swept" if best else "given"
        entry: dict[str, Any] = {"learning_rate": rate * factor, "learning_rate_from": origin}
        if best:
            entry["learning_rate_at_edge"] = rate in (min(rule.sweep), max(rule.sweep))
        rates.setdefault(m.size.name, {})[m.name] = entry
    return rates
