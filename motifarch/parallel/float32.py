"""What stays float32 where the rest of a model is computed in fewer bits.

FSDP2 gathers parameters in the compute dtype. A router's weight rounded to bfloat16 sends one token
in twenty elsewhere, and the numbers that steer streams, norms and lambda are few: in models with
experts or hyper-connections these are gathered as they are, in one message a layer.
"""

from collections.abc import Iterator

from torch import nn
from torch.distributed.fsdp import FSDPModule

from motifarch.layers import HyperConnections, PolyNorm
from motifarch.layers.poly_norm import GroupedPolyNorm
from motifarch.layers.router import Float32Linear, Router
from motifarch.layers.wide_linear import WideLinear

_FLOAT32 = (Float32Linear, WideLinear, HyperConnections, nn.RMSNorm, PolyNorm, GroupedPolyNorm)


def keeps_float32(model: nn.Module) -> bool:
    """Whether a model has parts that ask for it."""
    return any(isinstance(module, Router | HyperConnections) for module in model.modules())


def float32_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules within one whose parameters are used in float32: routers' and lambda's
    projections, hyper-connections, norms, PolyNorm. Those that FSDP2 has already are left out, with
    all that is in them.
    """
    for child in module.children():
        if isinstance(child, FSDPModule):
            continue
        if isinstance(child, _FLOAT32):
            yield child
        else:
            yield from float32_modules(child)
