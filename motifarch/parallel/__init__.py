"""Process groups, device meshes and sharding, applied to models from outside."""

from motifarch.parallel.launch import World, launched_rank, launched_world_size, open_world
from motifarch.parallel.parallelize import build_mesh, parallelize, set_gradient_sync

__all__ = [
    "World",
    "build_mesh",
    "launched_rank",
    "launched_world_size",
    "open_world",
    "parallelize",
    "set_gradient_sync",
]
