"""A linear layer's matrix, for products that the layer itself does not do."""

import torch
from torch import Tensor, nn


def linear_weight(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The matrix (out, in) that a layer without bias multiplies inputs (..., in) by.

    A plain nn.Linear has it. What wraps one, offloads it, quantises it or adds an adapter is called
    with the identity, so that the matrix is the one that its calls use.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if type(layer) is nn.Linear and not hooked and not layer.weight.is_meta:
        return layer.weight
    out: Tensor = layer(torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device))
    return out.mT
