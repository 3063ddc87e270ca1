"""The one free size that makes models equal in cost.

Imports nothing, so that benchmarks can use it where a study's packages are missing.
"""

from collections.abc import Callable


def match_intermediate_size(cost: Callable[[int], float], target: float, *, multiple: int = 1) -> int:
    """The intermediate size that makes a model's cost most nearly a target.

    Args:
        cost: the cost (parameters, FLOPs, ...) of the model with an intermediate size, which has to
            grow by the same amount with each unit of it.
        target: the cost to come near to.
        multiple: sizes are multiples of this.

    Returns:
        The nearest allowed size, at least `multiple`; the caller judges whether it is near enough.
    """
    one, two = cost(multiple), cost(2 * multiple)
    return multiple * max(1, 1 + round((target - one) / (two - one)))
