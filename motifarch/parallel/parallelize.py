"""Cuts a model over a mesh, from outside.

In this order: 8-bit products, tensor, expert and context parallelism, checkpointing, compile,
FSDP2.

The model knows nothing of it. Expected of a model is `model.model.layers`, a ModuleList of decoder
layers; one of `mtp_layers` beside it is taken for more of them.
"""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from motifarch.decoder_layers import decoder_layers
from motifarch.parallel.activation_checkpointing import Recompute, apply_activation_checkpointing
from motifarch.parallel.compilation import apply_compile
from motifarch.parallel.context import apply_context_parallel
from motifarch.parallel.expert import apply_expert_parallel, shard_experts
from motifarch.parallel.low_precision import Matmul, apply_low_precision
from motifarch.parallel.mesh import Mesh
from motifarch.parallel.tensor import apply_tensor_parallel


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    *,
    compute_dtype: torch.dtype = torch.float32,
    matmul: Matmul = "compute",
    emulate_matmul: bool = False,
    activation_checkpointing: Recompute = "none",
    compile: bool = False,
) -> nn.Module:
    """Cuts a causal language model over the ranks of a mesh; works in place, with one rank too.

    The model has `model.model.layers` and is on the meta device (`motifarch.parallel.initialize`
    then gives it weights), or the same on every rank. Its parameters become DTensors: float32
    shards, gathered in compute_dtype for each layer's work, with gradients reduced in float32 to
    their mean over the ranks (`Layout.grad_reduce_size` of them).

    Args:
        model: the model, which is also returned.
        mesh: the ranks.
        compute_dtype: what matrices are multiplied in.
        matmul: what those of the inner decoder layers are multiplied in, if not compute_dtype.
        emulate_matmul: round as `matmul` says without the hardware for it.
        activation_checkpointing: what the backward pass recomputes.
        compile: compile each decoder layer.

    Raises:
        UserError: torchao or the model's sizes don't allow `matmul`.

    Source: Zhao et al., PyTorch FSDP, arXiv 2304.11277; `torch.distributed.fsdp.fully_shard`.
    """
    # First, for it replaces the layers that tensor parallelism hangs itself on.
    apply_low_precision(model, matmul, tensor=mesh.layout.tensor, emulate=emulate_matmul)
    if mesh.tensor is not None:
        apply_tensor_parallel(model, mesh.tensor)
    if mesh.experts is not None:
        apply_expert_parallel(model, mesh.experts, compute_dtype)
    if mesh.context is not None:
        apply_context_parallel(model, mesh.context)
    apply_activation_checkpointing(model, activation_checkpointing)
    if compile:
        apply_compile(model)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        # Hidden states are in compute_dtype; casting would only round the float32 rotary tables.
        cast_forward_inputs=False,
    )
    if mesh.experts is not None:
        shard_experts(model, mesh, policy)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh.parameters, mp_policy=policy)
    # Embedding, last norm and output projection: the root keeps tied matrices in one group.
    fully_shard(model, mesh=mesh.parameters, mp_policy=policy)
    return model


def prepare_micro_batch(model: nn.Module, *, last: bool) -> None:
    """Says, before each micro-batch's forward pass, whether it is the `last` of its step.

    Gradients are reduce-scattered after each micro-batch and added up in float32 shards: whole
    ones never wait for the next. Copies of the shards (HSDP) are averaged once, after the last.
    """
    model.set_requires_all_reduce(last)  # type: ignore[operator]
