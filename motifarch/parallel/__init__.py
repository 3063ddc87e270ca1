"""Process groups, device meshes and sharding, applied to models from outside."""

from motifarch.layout import Layout
from motifarch.parallel.activation_checkpointing import check_activation_checkpointing
from motifarch.parallel.context import check_context_parallel, shard_sequence
from motifarch.parallel.expert import check_expert_parallel
from motifarch.parallel.fsdp import prepare_micro_batch
from motifarch.parallel.initialize import initialize
from motifarch.parallel.launch import World, launched_rank, launched_world_size, open_world
from motifarch.parallel.low_precision import check_low_precision
from motifarch.parallel.mesh import Mesh
from motifarch.parallel.parallelize import parallelize
from motifarch.parallel.tensor import check_tensor_parallel
from motifarch.parallel.watchdog import Watchdog

# The name in 0.1.0, deprecated.
own_tokens = shard_sequence

__all__ = [
    "Layout",
    "Mesh",
    "Watchdog",
    "World",
    "check_activation_checkpointing",
    "check_context_parallel",
    "check_expert_parallel",
    "check_low_precision",
    "check_tensor_parallel",
    "initialize",
    "launched_rank",
    "launched_world_size",
    "open_world",
    "own_tokens",
    "parallelize",
    "prepare_micro_batch",
    "shard_sequence",
]
