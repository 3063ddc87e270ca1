"""PolyNorm as a module (arXiv 2411.03884)."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motif_kernels import mul_poly_norm, poly_norm


class PolyNorm(nn.Module):
    """``w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` with ``n(z) = z / sqrt(mean(z^2) + eps)`` over the
    last dimension.

    The weight (3,) starts at 1/3 each and the bias (1,) at 0.

    Args:
        eps: added to each mean square.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self, *, eps: float = 1e-6, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group: ProcessGroup | None = None
        """Ranks that each hold some of the columns (tensor parallelism): set from outside."""
        self.weight = nn.Parameter(torch.empty(3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights to 1/3, bias to 0."""
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """Apply to the last dimension of x (..., N); multiplied by ``up``, of x's shape, before the
        one rounding.
        """
        if up is None:
            return poly_norm(x, self.weight, self.bias, eps=self.eps, group=self.group)
        return mul_poly_norm(x, up, self.weight, self.bias, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"eps={self.eps}"


def gated(act_fn: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``act_fn(gate) * up``, both (..., N); with a PolyNorm rounded once.

    What wraps a PolyNorm, or was put in its place, is called as any activation.
    """
    return act_fn(gate, up) if isinstance(act_fn, PolyNorm) else act_fn(gate) * up
