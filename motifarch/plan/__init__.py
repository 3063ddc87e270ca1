"""Plans a run on many GPUs from one CPU: memory, traffic, FLOPs and time."""

from typing import TYPE_CHECKING, Any

from motifarch.plan.hardware import GPUS, Gpu, find_gpu

if TYPE_CHECKING:
    from motifarch.plan.planning import Plan, make_plan
    from motifarch.plan.timing import Assumptions

__all__ = ["GPUS", "Assumptions", "Gpu", "Plan", "find_gpu", "make_plan"]


def __getattr__(name: str) -> Any:
    # The table of GPUs is of use where the libraries that read recipes and data are not installed.
    if name in __all__:
        from motifarch.plan import planning, timing

        return getattr(timing if name == "Assumptions" else planning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
