"""How FSDP2 is used: what is gathered together, in which dtype, and when it is freed."""

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from motifarch.decoder_layers import decoder_layers
from motifarch.layout import Layout
from motifarch.parallel.expert import expert_blocks
from motifarch.parallel.float32 import float32_modules, keeps_float32
from motifarch.parallel.mesh import Mesh


def apply_fsdp(model: nn.Module, mesh: Mesh, compute_dtype: torch.dtype) -> None:
    """Shards a causal language model's parameters, in place.

    A decoder layer is gathered as one unit, but for its experts, of which ranks may have different
    ones, and for what stays float32. Embedding, last norm and output projection are the root's: it
    keeps tied matrices in one group.
    """
    layers = decoder_layers(model)
    exact = torch.float32 if keeps_float32(model) else compute_dtype
    freed = round(mesh.layout.reshard_after_forward * len(layers))
    for i, layer in enumerate(layers):
        options: dict[str, Any] = {"dtype": compute_dtype, "exact": exact, "reshard_after_forward": i < freed}
        for block in expert_blocks(layer):
            units = _shard(block.experts, mesh.expert_parameters, **options)
            if mesh.experts is not None:
                _divide_by_all(units, mesh)
        _shard(layer, mesh.parameters, **options)
    _shard(model, mesh.parameters, dtype=compute_dtype, exact=exact, reshard_after_forward=None)


def _shard(
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    exact: torch.dtype,
    reshard_after_forward: bool | None,
) -> list[FSDPModule]:
    """Makes a unit of what of a module is in none yet, and one of its modules that stay exact."""

    def unit(modules: nn.Module | list[nn.Module], dtype: torch.dtype) -> FSDPModule:
        # Hidden states are in the compute dtype; casting would only round float32 rotary tables.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        sharded = fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        return sharded[0] if isinstance(sharded, list) else sharded

    units = []
    if exact != dtype and (modules := list(float32_modules(module))):
        units.append(unit(modules, exact))
    return [*units, unit(module, dtype)]


def _divide_by_all(units: list[FSDPModule], mesh: Mesh) -> None:
    """Has gradients of experts that are one rank's divided by the number of all ranks.

    Tokens of the other ranks reach them through the exchange, and so do their gradients, as a sum:
    what is left is to reduce over copies.
    """
    for unit in units:
        unit.set_gradient_divide_factor(mesh.layout.grad_reduce_size)
        # Gloo does not know NCCL's operation that divides as it sums.
        if mesh.expert_parameters.device_type == "cpu" and mesh.layout.expert_shard > 1:
            unit.set_force_sum_reduction_for_comms(True)


def prepare_micro_batch(model: nn.Module, layout: Layout, *, last: bool) -> None:
    """Says, before each micro-batch's forward pass, whether it is the `last` of its step.

    Gradients are reduce-scattered after each micro-batch and added up in float32 shards: whole
    ones never wait for the next. Copies of the shards (HSDP) are averaged once, after the last.
    Experts' parameters stay gathered until then, if the layout says so.
    """
    model.set_requires_all_reduce(last)  # type: ignore[operator]
    for block in expert_blocks(model):
        cast(FSDPModule, block.experts).set_reshard_after_backward(last or layout.reshard_experts)
