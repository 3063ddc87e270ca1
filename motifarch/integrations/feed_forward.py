"""PolyNorm in the feed-forward modules of a transformers model."""

import functools
from typing import Any

from torch import Tensor, nn

from motifarch.integrations.derived import Derived, derive
from motifarch.layers import PolyNorm
from motifarch.layers.poly_norm import gated

_cache: Any = functools.cache  # which mypy thinks has no use for these classes


class PolyNormMixin(Derived):
    """Mixed into a host's gated feed-forward: ``down_proj(PolyNorm(gate_proj(x)) * up_proj(x))``.

    Source: PolyNorm, arXiv 2411.03884. The product is taken before the one rounding.
    """

    act_fn: PolyNorm

    def forward(self, x: Tensor) -> Tensor:
        """X (..., E) -> (..., E)."""
        host: Any = self
        return host.down_proj(gated(self.act_fn, host.gate_proj(x), host.up_proj(x)))  # type: ignore[no-any-return]


@_cache
def poly_norm_class(host: type) -> type:
    """The PolyNorm class of a host's gated feed-forward class."""
    return type(f"PolyNorm{host.__name__}", (PolyNormMixin, host), {"made_by": (poly_norm_class, host)})


def with_poly_norm(module: nn.Module, *, fused: bool) -> Any:
    """A host's feed-forward module, or its routed experts, with a new PolyNorm for activation.

    Args:
        module: has ``act_fn``.
        fused: it is a gated feed-forward: the product with the other branch is PolyNorm's, too.
            Experts share one PolyNorm, which they call themselves.
    """
    result = derive(module, poly_norm_class(type(module)) if fused else type(module))
    weight = next(module.parameters())
    result.act_fn = PolyNorm(device=weight.device, dtype=weight.dtype)
    return result
