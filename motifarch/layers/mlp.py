"""Gated feed-forward blocks: PolyNorm's (Motif) and SwiGLU (arXiv 2002.05202), the baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motifarch.layers.poly_norm import PolyNorm, gated


class _GatedMLP(nn.Module):
    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)


class PolyNormMLP(_GatedMLP):
    """``down(PolyNorm(gate(x)) * up(x))``, as in the Motif models.

    Args:
        hidden_size: e.
        intermediate_size: width of the gate and up branches.
        eps: PolyNorm's epsilon.
        sigmoid_weight: PolyNorm's weights are ``sigmoid(weight)``.
        output_scale: multiplies the activation, before the one rounding.
        hidden_clamp: clamp gate and up to ``[-hidden_clamp, hidden_clamp]``.
        bias: biases in the projections.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        intermediate_size: int,
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        hidden_clamp: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, intermediate_size=intermediate_size, bias=bias, device=device, dtype=dtype)
        self.act_fn = PolyNorm(
            eps=eps,
            sigmoid_weight=sigmoid_weight,
            output_scale=output_scale,
            hidden_clamp=hidden_clamp,
            device=device,
            dtype=dtype,
        )

    def forward(self, x: Tensor) -> Tensor:
        """X (..., E) -> (..., E)."""
        return self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))


class SwiGLUMLP(_GatedMLP):
    """``down(silu(gate(x)) * up(x))``.

    Args:
        hidden_size: e.
        intermediate_size: width of the gate and up branches.
        bias: biases in the projections.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """X (..., E) -> (..., E)."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
