"""PolyNorm in the feed-forward modules of a transformers model."""

import functools
from typing import Any

from torch import Tensor, nn

from motifarch.integrations.derived import Derived, derive
from motifarch.integrations.layouts import FeedForwardLayout
from motifarch.layers import PolyNorm
from motifarch.layers.poly_norm import gated

_cache: Any = functools.cache  # which mypy thinks has no use for these classes


def gate_and_up(module: Any, layout: FeedForwardLayout, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both branches of a gated feed-forward of x (..., E)."""
    branches = [getattr(module, name)(x) for name in layout.inputs]
    gate, up = branches if len(branches) == 2 else branches[0].chunk(2, dim=-1)
    return gate, up


class PolyNormMixin(Derived):
    """Mixed into a host's gated feed-forward: ``down_proj(PolyNorm(gate_proj(x)) * up_proj(x))``.

    Source: PolyNorm, arXiv 2411.03884. The product is taken before the one rounding.
    """

    layout: FeedForwardLayout

    def forward(self, x: Tensor) -> Tensor:
        """X (..., E) -> (..., E)."""
        gate, up = gate_and_up(self, self.layout, x)
        product = gated(getattr(self, self.layout.activation), gate, up)
        return getattr(self, self.layout.output)(product)  # type: ignore[no-any-return]


@_cache
def poly_norm_class(host: type) -> type:
    """The PolyNorm class of a host's gated feed-forward class."""
    return type(f"PolyNorm{host.__name__}", (PolyNormMixin, host), {"made_by": (poly_norm_class, host)})


def with_poly_norm(module: nn.Module, layout: FeedForwardLayout | None) -> Any:
    """A host's feed-forward module, or its routed experts, with a new PolyNorm for activation.

    Args:
        module: has an activation.
        layout: of the feed-forward; None for experts, which share one PolyNorm. A gate's product
            with the other branch is PolyNorm's, too; other modules call PolyNorm themselves.
    """
    gated_one = layout is not None and layout.gated
    result = derive(module, poly_norm_class(type(module)) if gated_one else type(module))
    weight = next(module.parameters())
    activation = PolyNorm(device=weight.device, dtype=weight.dtype)
    setattr(result, "act_fn" if layout is None else layout.activation, activation)
    if gated_one:
        result.layout = layout
    return result
