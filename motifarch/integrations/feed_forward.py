"""PolyNorm in the feed-forward modules of a transformers model."""

from typing import Any

from torch import Tensor

from motif_kernels import mul_poly_norm
from motifarch.layers import PolyNorm


class PolyNormMixin:
    """Mixed into a host's gated feed-forward: ``down_proj(PolyNorm(gate_proj(x)) * up_proj(x))``.

    Source: PolyNorm, arXiv 2411.03884. The product is taken before the one rounding.
    """

    act_fn: PolyNorm

    def forward(self, x: Tensor) -> Tensor:
        """X (..., E) -> (..., E)."""
        host: Any = self
        product = mul_poly_norm(
            host.gate_proj(x), host.up_proj(x), self.act_fn.weight, self.act_fn.bias, eps=self.act_fn.eps
        )
        return host.down_proj(product)  # type: ignore[no-any-return]


def swap_activation(module: Any) -> None:
    """Give a host's gated feed-forward module, in place, PolyNorm with new parameters."""
    weight = module.gate_proj.weight
    module.act_fn = PolyNorm(device=weight.device, dtype=weight.dtype)
    module.__class__ = type(f"PolyNorm{type(module).__name__}", (PolyNormMixin, type(module)), {})


def swap_experts_activation(module: Any) -> None:
    """Give a host's routed experts, in place, one PolyNorm that all experts of the layer share."""
    weight = module.gate_up_proj
    module.act_fn = PolyNorm(device=weight.device, dtype=weight.dtype)
