"""Plans a run on a cluster from one CPU: memory, traffic, operations and time of a recipe on many GPUs."""

from motifarch.plan.hardware import GPUS, Gpu, find_gpu
from motifarch.plan.planning import Plan, make_plan
from motifarch.plan.timing import Assumptions

__all__ = ["GPUS", "Assumptions", "Gpu", "Plan", "find_gpu", "make_plan"]
