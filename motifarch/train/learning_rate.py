"""A run's learning rate by its recipe, and what becomes of it where another recipe goes on."""

from typing import Any

from motifarch.optim import build_schedule
from motifarch.optim.schedule import Schedule
from motifarch.train.recipe import Recipe

# What decides the learning rate, as `build_schedule` and as recipes name it.
_FIELDS = {
    "name": "optim.schedule",
    "total_steps": "run.steps",
    "warmup_steps": "optim.warmup_steps",
    "decay_steps": "optim.decay_steps",
    "decay_shape": "optim.decay_shape",
    "min_ratio": "optim.min_lr_ratio",
}


def decay_steps(recipe: Recipe) -> int:
    """The steps of the final decay: a fifth of the run where the recipe leaves them open."""
    if recipe.optim.decay_steps is not None:
        return recipe.optim.decay_steps
    return min(recipe.run.steps // 5, recipe.run.steps - recipe.optim.warmup_steps)


def schedule_settings(recipe: Recipe) -> dict[str, Any]:
    """The arguments of `build_schedule`."""
    optim = recipe.optim
    values = (
        optim.schedule,
        recipe.run.steps,
        optim.warmup_steps,
        decay_steps(recipe),
        optim.decay_shape,
        optim.min_lr_ratio,
    )
    return dict(zip(_FIELDS, values, strict=True))


def learning_rates(recipe: Recipe) -> Schedule:
    """The learning rate of each step, counted from 0."""
    factor, peak = build_schedule(**schedule_settings(recipe)), recipe.optim.lr
    return lambda step: peak * factor(step)


def about_learning_rate(recipe: Recipe) -> dict[str, Any]:
    """What a checkpoint notes of its run's learning rate."""
    return {"peak": recipe.optim.lr, **schedule_settings(recipe)}


def learning_rate_change(before: dict[str, Any], recipe: Recipe, step: int) -> str | None:
    """What becomes of the learning rate where a recipe goes on after ``step`` steps of another's.

    Args:
        before: what `about_learning_rate` gave of the other.
        recipe: the recipe.
        step: the steps done.

    Returns:
        A line; None if the next step's is as it would have been, in a run that has not decayed.
    """
    now = about_learning_rate(recipe)
    names = {"peak": "optim.lr", **_FIELDS}
    changes = [f"{names[key]} was {before[key]}, is {value}" for key, value in now.items() if before[key] != value]
    settings = {key: before[key] for key in _FIELDS}
    old, new = build_schedule(**settings), learning_rates(recipe)
    last, planned, following = before["peak"] * old(step - 1), before["peak"] * old(step), new(step)
    if not changes or step < 1 or following == planned:
        return None
    decayed = step > before["warmup_steps"] and old(step - 1) < 1
    rises = ", up again from where it had decayed to" if decayed and following > last else ""
    return (
        f"the learning rate of step {step + 1} is {following:.3g}, after {last:.3g} at step {step}{rises} "
        f"({'; '.join(changes)})"
    )
