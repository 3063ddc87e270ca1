"""Expert parallelism: ranks share the routed experts, and tokens travel to them and back."""

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch
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
    exchange = choose_exchange(mesh.device_type, compute_dtype)
    for block in expert_blocks(model):
        deal_out(block, mesh)
        block.exchange = exchange


def choose_exchange(device_type: str, compute_dtype: torch.dtype) -> type[TokenExchange] | type[DeepEPExchange]:
    """What sends tokens of a dtype on a kind of device."""
    if device_type == "cuda" and compute_dtype == torch.bfloat16:
        with contextlib.suppress(ImportError):
            importlib.import_module("deep_ep")
            return DeepEPExchange
    return TokenExchange


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
