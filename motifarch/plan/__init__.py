"""Plans a run on many GPUs from one CPU: memory, traffic, FLOPs and time."""

from motifarch.hardware import GPUS, Gpu, find_gpu
from motifarch.plan.planning import Plan, make_plan
from motifarch.plan.timing import Assumptions

__all__ = ["GPUS", "Assumptions", "Gpu", "Plan", "find_gpu", "make_plan"]
