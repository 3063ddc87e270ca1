"""QK-clip on sharded layers against the same on a whole one: functions that ranks run."""

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from motifarch.layers import (
    DifferentialAttentionV2,
    GroupedDifferentialAttention,
    GroupedDifferentialLatentAttention,
)
from motifarch.layers.base_attention import BaseAttention
from motifarch.optim import clip_heads, clip_layers
from motifarch.parallel import open_world
from motifarch.shards import local_ranges

_SIZES: dict[str, Any] = {"num_noise_heads": 4, "num_kv_heads": 8, "head_dim": 6, "layer_idx": 0, "bias": True}

_LATENT: dict[str, Any] = {"head_dim": 7, "qk_rope_head_dim": 2, "v_head_dim": 4, "q_lora_rank": 6, "kv_lora_rank": 5}


def clip_on_ranks() -> None:
    """Layers cut by FSDP2, heads across ranks, and by tensor parallelism before it."""
    with open_world() as world:
        for tensor in (1, 2):
            torch.manual_seed(0)
            layers: list[BaseAttention] = [
                GroupedDifferentialAttention(10, num_heads=12, **_SIZES),
                DifferentialAttentionV2(10, num_heads=8, **(_SIZES | {"num_kv_heads": 2, "head_dim": 5})),
                GroupedDifferentialLatentAttention(10, num_heads=10, ratio=4, **_LATENT),
            ]
            heads = [(8, 4), (4, 4), (8, 2)]
            whole = copy.deepcopy(layers)
            # What each rank has seen: different data, of which the largest counts.
            seen = [[tuple(torch.rand(n) * 20 for n in counts) for counts in heads] for _ in range(world.size)]
            mesh = init_device_mesh("cpu", (world.size // tensor, tensor), mesh_dim_names=("data", "tensor"))
            part = mesh["tensor"].get_local_rank()
            for number, (layer, maxima) in enumerate(zip(layers, seen[world.rank], strict=True)):
                if tensor > 1:
                    parallelize_module(layer, mesh["tensor"], {n: ColwiseParallel() for n in _names(number)})
                    layer.share_heads(mesh["tensor"].get_group())
                fully_shard(layer, mesh=mesh["data"])
                layer.max_logits = tuple(m.chunk(tensor)[part] for m in maxima)  # type: ignore[assignment]
            clip_layers(layers, tau=7.0)

            for number, (layer, full) in enumerate(zip(layers, whole, strict=True)):
                largest = []
                for kind in range(2):
                    # A rank of tensor parallelism looks at its own heads alone.
                    by_rank = [
                        torch.stack(
                            [seen[r][number][kind].chunk(tensor)[p] for r in range(world.size) if r % tensor == p]
                        ).amax(0)
                        for p in range(tensor)
                    ]
                    largest.append(torch.cat(by_rank))
                first = f"{_names(number)[0]}.weight"
                start = full.get_parameter(first).detach().clone()
                clip_heads(full, *largest, tau=7.0)
                assert not torch.equal(full.get_parameter(first), start)
                for name in _names(number):
                    _same(layer.get_submodule(name), full.get_submodule(name))
        dist.barrier()


def _names(number: int) -> tuple[str, str]:
    """Of a layer's projections, those that make queries and keys."""
    return ("wq_b", "wkv_b") if number == 2 else ("q_proj", "k_proj")


def _same(sharded: nn.Module, whole: nn.Module) -> None:
    for found, expected in zip(sharded.parameters(), whole.parameters(), strict=True):
        rows = local_ranges(found)[0]
        local = torch.cat([expected[a:b] for a, b in rows] or [expected[:0]])
        assert torch.equal(found.to_local(), local)  # type: ignore[operator]
