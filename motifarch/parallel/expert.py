"""Expert parallelism: ranks share the routed experts, and tokens travel to them and back."""

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from motifarch.errors import UserError
from motifarch.layers import MixtureOfExperts
from motifarch.layers.deep_ep_exchange import DeepEPExchange
from motifarch.layers.token_exchange import TokenExchange


def check_expert_parallel(config: Any, ranks: int) -> None:
    """Refuses a MotifConfig's model whose experts so many ranks cannot share.

    Raises:
        UserError: there are none, or the number does not divide theirs.
    """
    if ranks == 1:
        return
    experts = config.num_experts
    if not experts:
        raise UserError(f"parallel.expert is {ranks}, but the model has no experts; set it to 1, or model.num_experts")
    if experts % ranks:
        fitting = ", ".join(str(n) for n in range(1, experts + 1) if experts % n == 0)
        raise UserError(
            f"parallel.expert is {ranks}, which does not divide the {experts} experts (model.num_experts); it may be "
            f"{fitting}"
        )


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype = torch.float32) -> None:
    """Deals a model's routed experts out over a one-dimensional mesh, in place: each rank keeps
    consecutive ones, whole. The model is on the meta device, or the same on every rank.

    Tokens are exchanged by all-to-all; in bfloat16 on a GPU by DeepEP, where it is installed.
    """
    exchange = choose_exchange(mesh.device_type, compute_dtype, mesh.get_group())
    for block in expert_blocks(model):
        deal_out(block, mesh)
        block.exchange = exchange


def choose_exchange(
    device_type: str, compute_dtype: torch.dtype, group: dist.ProcessGroup
) -> type[TokenExchange] | type[DeepEPExchange]:
    """What sends tokens of a dtype on a kind of device, the same on all ranks.

    Raises:
        UserError: DeepEP is installed on some ranks alone.
        ImportError: it is installed and broken.
    """
    if device_type != "cuda" or compute_dtype != torch.bfloat16:
        return TokenExchange
    installed: list[bool] = [False] * dist.get_world_size(group)
    dist.all_gather_object(installed, _has_deep_ep(), group)
    if any(installed) and not all(installed):
        without = [dist.get_global_rank(group, i) for i, has in enumerate(installed) if not has]
        raise UserError(
            f"DeepEP is installed on some machines, but not on those of ranks {', '.join(map(str, without))}; install "
            "it on all or none"
        )
    return DeepEPExchange if all(installed) else TokenExchange


def _has_deep_ep() -> bool:
    try:
        importlib.import_module("deep_ep")
    except ModuleNotFoundError as error:
        if error.name != "deep_ep":  # something that it needs
            raise
        return False
    return True


def deal_out(block: MixtureOfExperts, mesh: DeviceMesh) -> None:
    """Deals one layer's routed experts out, as :func:`apply_expert_parallel` does all layers'."""
    block.expert_group = mesh.get_group()
    for module in block.experts.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            cut = distribute_tensor(parameter, mesh, [Shard(0)], src_data_rank=None)
            setattr(module, name, nn.Parameter(cut, requires_grad=parameter.requires_grad))


def expert_blocks(model: nn.Module) -> Iterator[MixtureOfExperts]:
    """The mixtures of experts in a model or a layer."""
    yield from (module for module in model.modules() if isinstance(module, MixtureOfExperts))
