"""Plans a run on many GPUs from one CPU: memory, traffic, FLOPs and time."""

from typing import TYPE_CHECKING

from motifarch.hardware import GPUS, Gpu, find_gpu
from motifarch.lazy_names import lazy_names
from motifarch.plan.assumptions import Assumptions

if TYPE_CHECKING:
    from motifarch.plan.planning import Plan, make_plan

__all__ = ["GPUS", "Assumptions", "Gpu", "Plan", "find_gpu", "make_plan"]

__getattr__ = lazy_names(__name__, {"Plan": "planning", "make_plan": "planning"})
