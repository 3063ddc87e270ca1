"""A linear layer's matrix, for products that the layer itself does not do."""

import torch
from torch import Tensor, nn


def linear_weight(layer: nn.Module) -> Tensor:
    """The matrix (out, in) that a layer without bias multiplies by.

    A plain nn.Linear has it. What wraps one, offloads it, quantises it or adds an adapter is called
    with the identity, so that the matrix is the one that its calls use.
    """
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if type(layer) is nn.Linear and not hooked and not layer.weight.is_meta:
        return layer.weight
    first = next(layer.parameters())
    dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    identity = torch.eye(int(layer.in_features), dtype=dtype, device=first.device)  # type: ignore[arg-type]
    out: Tensor = layer(identity)
    return out.mT
