"""PolyNorm as a module (arXiv 2411.03884), for all rows or for those of each expert."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from motif_kernels import grouped_mul_poly_norm, mul_poly_norm, poly_norm
from motifarch.layers.local_part import local_part


class _Coefficients(nn.Module):
    """The coefficients of one PolyNorm or of several, and its options."""

    def __init__(
        self,
        *several: int,
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        bias_clamp: float | None = None,
        hidden_clamp: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.sigmoid_weight, self.output_scale = eps, sigmoid_weight, output_scale
        self.bias_clamp, self.hidden_clamp = bias_clamp, hidden_clamp
        self.weight = nn.Parameter(torch.empty(*several, 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*several, 1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights to 1/3, bias to 0."""
        nn.init.constant_(self.weight, 1 / 3)
        nn.init.zeros_(self.bias)

    @property
    def _options(self) -> dict[str, Any]:
        """As motif_kernels takes them."""
        return {
            "eps": self.eps,
            "sigmoid_weight": self.sigmoid_weight,
            "out_scale": self.output_scale,
            "bias_clamp": self.bias_clamp,
            "hidden_clamp": self.hidden_clamp,
        }

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        usual = {"sigmoid_weight": False, "output_scale": 1.0, "bias_clamp": None, "hidden_clamp": None}
        others = (f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value)
        return ", ".join((f"eps={self.eps}", *others))


class PolyNorm(_Coefficients):
    """``w0 n(x^3) + w1 n(x^2) + w2 n(x) + b`` with ``n(z) = z / sqrt(mean(z^2) + eps)`` over the
    last dimension.

    The weight (3,) starts at 1/3 each and the bias (1,) at 0. The options but ``eps`` are those of
    the Motif models with experts.

    Args:
        eps: added to each mean square.
        sigmoid_weight: use ``sigmoid(weight)``, taken in float32.
        output_scale: multiplies the result, before the one rounding.
        bias_clamp: use ``clamp(bias, -bias_clamp, bias_clamp)``; None for the bias as it is.
        hidden_clamp: clamp x, and up, to ``[-hidden_clamp, hidden_clamp]`` first.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        *,
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        bias_clamp: float | None = None,
        hidden_clamp: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            eps=eps,
            sigmoid_weight=sigmoid_weight,
            output_scale=output_scale,
            bias_clamp=bias_clamp,
            hidden_clamp=hidden_clamp,
            device=device,
            dtype=dtype,
        )
        self.group: ProcessGroup | None = None
        """Ranks that each hold some of the columns (tensor parallelism): set from outside."""

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        """Apply to the last dimension of x (..., N); multiplied by ``up``, of x's shape, before the
        one rounding.
        """
        if up is None:
            return poly_norm(x, self.weight, self.bias, group=self.group, **self._options)
        return mul_poly_norm(x, up, self.weight, self.bias, group=self.group, **self._options)


class GroupedPolyNorm(_Coefficients):
    """``PolyNorm(gate) * up`` of rows sorted by expert, each with its expert's coefficients.

    The weight (num_experts, 3) starts at 1/3 each and the bias (num_experts, 1) at 0.

    Args:
        num_experts: how many there are.
        eps: added to each mean square.
        sigmoid_weight: use ``sigmoid(weight)``, taken in float32.
        output_scale: multiplies the result, before the one rounding.
        bias_clamp: use ``clamp(bias, -bias_clamp, bias_clamp)``; None for the bias as it is.
        hidden_clamp: clamp gate, up and, before it is scaled, their product to ``[-hidden_clamp,
            hidden_clamp]``.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        num_experts: int,
        *,
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        bias_clamp: float | None = None,
        hidden_clamp: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts,
            eps=eps,
            sigmoid_weight=sigmoid_weight,
            output_scale=output_scale,
            bias_clamp=bias_clamp,
            hidden_clamp=hidden_clamp,
            device=device,
            dtype=dtype,
        )

    def forward(self, gate: Tensor, up: Tensor | None, offsets: Tensor) -> Tensor:
        """Gate and up (T, N), expert e's rows ending before ``offsets[e]`` (int32) -> (T, N).

        Without up, gate (T, 2 N) holds both, itself first.
        """
        weight, bias = local_part(self.weight), local_part(self.bias)
        return grouped_mul_poly_norm(gate, up, weight, bias, offsets, **self._options)


def gated(act_fn: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``act_fn(gate) * up``, both (..., N); with a PolyNorm rounded once.

    What wraps a PolyNorm, or was put in its place, is called as any activation.
    """
    return act_fn(gate, up) if isinstance(act_fn, PolyNorm) else act_fn(gate) * up
