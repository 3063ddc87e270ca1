"""Shards a model from outside: activation checkpointing, compile, FSDP2, in this order.

The model knows nothing of it. Expected of a model is `model.model.layers`, a ModuleList of decoder layers.
"""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard


def build_mesh(device_type: str, world_size: int) -> DeviceMesh:
    """Returns a one-dimensional mesh of all ranks, over which parameters and data are both split."""
    return init_device_mesh(device_type, (world_size,), mesh_dim_names=("shard",))


def parallelize(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> nn.Module:
    """Shards each decoder layer, then the rest, with FSDP2; works in place, with one rank too.

    Every rank must hold the same full float32 model. Its parameters become DTensors: float32 shards, gathered in
    compute_dtype for each layer's work, with gradients reduced in float32 to their mean over the ranks.

    Args:
        model: A causal language model with `model.model.layers`.
        mesh: The ranks to shard over.
        compute_dtype: What matrices are multiplied in.
        activation_checkpointing: Recompute each layer's activations in the backward pass.
        compile: Compile each decoder layer.

    Returns:
        The same model.

    Source: Zhao et al., PyTorch FSDP, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
    """
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr, assignment]
    if compile:
        for layer in layers:
            layer.compile()
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # Hidden states are in compute_dtype already; casting would only round the float32 rotary tables.
        cast_forward_inputs=False,
    )
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embedding, last norm and output projection: the root keeps tied matrices in one group.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def set_gradient_sync(model: nn.Module, sync: bool) -> None:
    """Switches gradient reduction on (a step's last micro-batch) or off (those before it)."""
    model.set_requires_gradient_sync(sync)  # type: ignore[operator]
