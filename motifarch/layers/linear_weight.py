"""A linear layer's matrix, for products that the layer itself does not do."""

import torch
from torch import Tensor, nn


def is_plain(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the layer is the forward of that very class with the weight that it has:
    nothing wraps it, hooks into it, offloads or parametrises it.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is kind and not hooked and not layer.weight.is_meta  # type: ignore[union-attr]


def linear_weight(layer: nn.Module, inputs: Tensor) -> Tensor:
    """The matrix (out, in) that a layer without bias multiplies inputs (..., in) by.

    A plain nn.Linear has it. What wraps one, offloads it, quantises it or adds an adapter is called
    with the identity, so that the matrix is the one that its calls use.
    """
    if is_plain(layer, nn.Linear):
        return layer.weight  # type: ignore[return-value]
    out: Tensor = layer(torch.eye(inputs.shape[-1], dtype=inputs.dtype, device=inputs.device))
    return out.mT
