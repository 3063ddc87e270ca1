"""Refuses a model whose weights alone no device here could hold, before any of it is made."""

import os
from pathlib import Path

import torch

from motifarch.errors import UserError
from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.parallel import Layout, World

# Float32 weights and gradients, and the fewest moments, Muon's; of frozen ones the weights alone.
_BYTES_A_PARAMETER, _BYTES_FROZEN = 12, 4
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check_memory(config: MotifConfig, layout: Layout, world: World, *, frozen: bool = False) -> None:
    """Refuses a model that cannot fit, of which the system would kill the process without a word.

    Args:
        config: the model's.
        layout: how the ranks are arranged, resolved.
        world: the ranks; those of a machine's CPU share its memory.
        frozen: adapters are trained, of a size that does not matter here.

    Raises:
        UserError: weights, gradients and moments need more than there is.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MotifForCausalLM(config).parameters())
    on_gpu = world.device.type == "cuda"
    here = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    held = (_BYTES_FROZEN if frozen else _BYTES_A_PARAMETER) * parameters
    needed = held * here / (layout.shard * layout.context * layout.tensor)
    memory = torch.cuda.get_device_properties(world.device).total_memory if on_gpu else cpu_memory()
    if needed > memory:
        what = "weights" if frozen else "weights, gradients and moments"
        raise UserError(
            f"the model has {parameters:,} parameters, of which {what} take at least "
            f"{needed / 2**30:,.1f} GiB of {'a GPU' if on_gpu else 'this machine'} that has {memory / 2**30:,.1f} GiB; "
            "use a smaller model.hidden_size, vocab_size or the like, or more ranks (`motifarch plan` says how many)"
        )


def cpu_memory() -> int:
    """Bytes that this machine, or the container that we are in, has."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in map(Path, _CGROUP_LIMITS):
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdecimal():
            found = min(found, int(text))
    return found
