"""How transformers cuts a Motif model over ranks: `from_pretrained(folder, tp_plan="auto")` under
torchrun.

transformers' own styles cut the projections; attention and PolyNorm have to know the ranks besides,
for they share parameters (sub-norm, lambda) and moments across what is cut.
"""

from typing import Any

import torch.distributed as dist
from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from motifarch.layers import PolyNorm
from motifarch.layers.projected_attention import ProjectedAttention
from motifarch.models.motif.configuration_motif import SHARED_STYLE


class SharedParallel(TensorParallelLayer):
    """The style of a layer whose own parameters are replicated, its heads or columns shared."""

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        """Tells an attention layer or a PolyNorm the ranks of a mesh.

        Raises:
            ValueError: heads that the ranks cannot share.
        """
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        if isinstance(module, ProjectedAttention):
            check_shared_heads(module, dist.get_world_size(group))
            module.share_heads(group)
        elif isinstance(module, PolyNorm):
            module.group = group
        else:
            raise TypeError(f"style {SHARED_STYLE!r} is for attention and PolyNorm, not {type(module).__name__}")
        return module


def check_shared_heads(attention: ProjectedAttention, ranks: int) -> None:
    """Checks that each rank can have whole groups of an attention layer's heads.

    Raises:
        ValueError: naming the number that does not divide, and those that would.
    """
    noise = attention.num_noise_heads
    queries = ("noise heads", noise) if noise else ("attention heads", attention.num_heads)
    paired, kv_heads = attention.paired_kv, attention.num_kv_heads
    keys = ("key/value pairs", kv_heads // 2) if paired else ("key/value heads", kv_heads)
    for name, count in (queries, keys):
        if count % ranks:
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ValueError(
                f"{ranks} ranks of tensor parallelism can't share the {count} {name} of this model: each takes whole "
                f"groups of them; tp_size may be {fitting}"
            )


ALL_PARALLEL_STYLES.register(SHARED_STYLE, SharedParallel())  # type: ignore[arg-type]  # typed for functions
