"""What to change when a recipe does not fit, or leaves much memory free: each change is planned."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from motifarch.errors import UserError
from motifarch.plan.memory import LOSS
from motifarch.plan.planning import Plan, Suggestion
from motifarch.train.recipe import Recipe

MUCH = 0.3
"""The free part of a GPU's usable memory from which on a faster setting is looked for."""

_STRONGER: dict[Any, list[Any]] = {"none": ["selective", "full"], "selective": ["full"], "full": []}


def changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """A copy of a recipe with some fields (dotted names) set."""
    for name, value in changes.items():
        section, _, last = name.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(recipe, section), **{last: value})
        recipe = dataclasses.replace(recipe, **{name: value})
    return recipe


def candidates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that may lower the memory, those that cost least speed first."""
    recipe, layout, trace = plan.recipe, plan.trace.layout, plan.trace
    for mode in _STRONGER.get(recipe.activation_checkpointing, ["full"]):
        yield {"activation_checkpointing": mode}
    if 1 < trace.micro_batches <= 4:
        # Without micro-batches to add up, gradients are reduced at once. More rows take more.
        yield {"batch.micro_size": trace.rows * trace.micro_batches}
    if layout.replicate > 1:
        step = next(n for n in range(2, layout.replicate + 1) if layout.replicate % n == 0)
        yield {"parallel.replicate": layout.replicate // step, "parallel.shard": layout.shard * step}
    if not recipe.optim.offload:
        yield {"optim.offload": True}
    if trace.rows > 1:
        yield {"batch.micro_size": max(1, trace.rows // 2)}
    for name in ("tensor", "context"):
        size = getattr(layout, name) * 2
        for other in ("shard", "replicate"):
            ranks = getattr(layout, other)
            if ranks % 2 == 0:
                yield {f"parallel.{name}": size, f"parallel.{other}": ranks // 2}
                break
    if recipe.optim.name == "muon" and recipe.optim.muon_chunk_mib > 32 and trace.peak_phase == "optimizer":
        yield {"optim.muon_chunk_mib": 32}


def may_fit(plan: Plan, change: dict[str, Any]) -> bool:
    """Whether a change can make a plan fit, as far as its memory says without planning it.

    What lies there between steps does not shrink by recomputing more or by fewer rows at once.
    """
    trace = plan.trace
    kept = trace.parameters + trace.gradients + trace.optimizer
    return kept <= plan.usable or not change.keys() <= {"activation_checkpointing", "batch.micro_size"}


def faster_candidates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes that take memory and may save time: less recomputation, no offloading, more
    rows at once, where these have room for their activations and logits.
    """
    recipe, trace = plan.recipe, plan.trace
    weaker: dict[Any, list[str]] = {"none": [], "selective": ["none"], "full": ["none", "selective"]}
    for mode in weaker.get(recipe.activation_checkpointing, ["none"]):
        yield {"activation_checkpointing": mode}
    if recipe.optim.offload:
        yield {"optim.offload": False}
    more = trace.activations + trace.highest[LOSS]
    if trace.micro_batches > 1 and plan.peak + more <= plan.usable:
        yield {"batch.micro_size": 2 * trace.rows}


def find_faster(
    plan: Plan, replan: Callable[[Recipe], Plan], *, say: Callable[[str], None] = lambda text: None
) -> Suggestion | None:
    """The change by which a plan that leaves much memory free is fastest and still fits; None where
    there is no such change, or it gains less than a hundredth.
    """
    if not plan.fits or plan.peak > (1 - MUCH) * plan.usable:
        return None
    found: list[Suggestion] = []
    for change in faster_candidates(plan):
        if any(change.keys() == other.changes.keys() for other in found):
            continue  # a stronger one of the same field fits
        say("trying " + ", ".join(f"{name} {value}" for name, value in change.items()))
        try:
            other = replan(changed(plan.recipe, change))
        except UserError:
            continue  # the batch can't be cut so
        if other.fits and other.tokens_per_second > 1.01 * plan.tokens_per_second:
            found.append(Suggestion(change, other.peak, True, other.tokens_per_second))
    return max(found, key=lambda suggestion: suggestion.tokens_per_second, default=None)


def find_suggestions(
    plan: Plan, replan: Callable[[Recipe], Plan], *, attempts: int = 10, say: Callable[[str], None] = lambda text: None
) -> list[Suggestion]:
    """Looks for changes that make a plan fit, by making so many others at most.

    Returns:
        The first single change that fits; else what was found by taking, again and again, the
        change that saves most. The last entry is the answer if it fits; those before it do not.
    """
    tried: list[Suggestion] = []
    base: dict[str, Any] = {}
    while len(tried) < attempts:
        best: tuple[Suggestion, Plan] | None = None
        for change in candidates(plan):
            if len(tried) >= attempts:
                break
            if not may_fit(plan, change):
                continue
            changes = base | change
            say("trying " + ", ".join(f"{name} {value}" for name, value in changes.items()))
            try:
                other = replan(changed(plan.recipe, change))
            except UserError:
                continue  # the model or the batch can't be cut so
            tried.append(Suggestion(changes, other.peak, other.fits, other.tokens_per_second))
            if other.fits:
                return tried
            if best is None or other.peak < best[0].peak:
                best = tried[-1], other
        if best is None or best[0].peak >= plan.peak:
            break
        base, plan = best[0].changes, best[1]
    return tried
