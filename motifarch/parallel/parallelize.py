"""Cuts a model over a mesh, from outside.

In this order: 8-bit products, tensor, expert and context parallelism, checkpointing, compile,
FSDP2.

The model knows nothing of it. Expected of a model is `model.model.layers`, a ModuleList of decoder
layers; one of `mtp_layers` beside it is taken for more of them.
"""

import torch
from torch import nn

from motifarch.parallel.activation_checkpointing import Recompute, apply_activation_checkpointing
from motifarch.parallel.compilation import apply_compile
from motifarch.parallel.context import apply_context_parallel
from motifarch.parallel.expert import apply_expert_parallel
from motifarch.parallel.fsdp import apply_fsdp
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
    shards, gathered in compute_dtype for each layer's work (a few in float32, see
    `motifarch.parallel.float32`), with gradients reduced in float32 to their mean over the ranks
    (`Layout.grad_reduce_size` of them).

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
    apply_fsdp(model, mesh, compute_dtype)
    return model
