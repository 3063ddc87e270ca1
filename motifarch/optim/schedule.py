"""Learning-rate schedules as pure functions of the step.

The step counts from 0. Nothing is stored, so a resumed run needs only its step.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

Schedule = Callable[[int], float]
"""Maps a step, counted from 0, to the factor that multiplies the peak learning rate."""


def warmup(step: int, warmup_steps: int) -> float:
    """Linear warm-up: 1/warmup_steps at step 0, 1 from step warmup_steps - 1 on."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_ratio: float,
    shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear",
) -> float:
    """Warm-up, stable, decay (Hu et al., MiniCPM, arXiv 2404.06395).

    Args:
        step: step, counted from 0.
        total_steps: steps of the run; its last step, total_steps - 1, has the factor min_ratio.
        warmup_steps: steps of linear warm-up.
        decay_steps: steps of the decay at the end of the run; 0 means no decay.
        min_ratio: the last factor.
        shape: `linear`; `cosine`; or `inverse_sqrt`, proportional to (1 + c t)^(-1/2) with t the
            decay's progress from 0 to 1 and c set by min_ratio (which must be above 0).

    Returns:
        The factor of the peak learning rate.

    Raises:
        ValueError: inverse_sqrt with a min_ratio of 0.
    """
    done = step - (total_steps - decay_steps) + 1
    if done <= 0 or decay_steps <= 0:
        return warmup(step, warmup_steps)
    t = min(1.0, done / decay_steps)
    if shape == "linear":
        return 1.0 - (1.0 - min_ratio) * t
    if shape == "cosine":
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * t))
    if min_ratio <= 0:
        raise ValueError("an inverse square root never reaches 0: give a min_ratio above 0")
    return 1.0 / math.sqrt(1.0 + (min_ratio**-2 - 1.0) * t)


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_ratio: float) -> float:
    """Linear warm-up, then half a cosine down to min_ratio (SGDR, arXiv 1608.03983)."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    t = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * t))


def build_schedule(
    name: Literal["wsd", "cosine", "constant"],
    *,
    total_steps: int,
    warmup_steps: int = 0,
    decay_steps: int = 0,
    decay_shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear",
    min_ratio: float = 0.0,
) -> Schedule:
    """Binds a schedule's settings; `constant` stays at 1 after the warm-up.

    Raises:
        ValueError: a name that is none of the three.
    """
    common: dict[str, Any] = {"total_steps": total_steps, "warmup_steps": warmup_steps, "min_ratio": min_ratio}
    if name == "wsd":
        return partial(wsd, decay_steps=decay_steps, shape=decay_shape, **common)
    if name == "cosine":
        return partial(cosine, **common)
    if name == "constant":
        return partial(warmup, warmup_steps=warmup_steps)
    raise ValueError(f"unknown schedule {name!r}; accepted are wsd, cosine and constant")
