"""Optimizers, learning-rate schedules and the guard against non-finite steps."""

from motifarch.optim.adamw import build_adamw, parameter_groups
from motifarch.optim.guard import clip_gradients, step_if_finite
from motifarch.optim.schedule import build_schedule, cosine, wsd

__all__ = ["build_adamw", "build_schedule", "clip_gradients", "cosine", "parameter_groups", "step_if_finite", "wsd"]
