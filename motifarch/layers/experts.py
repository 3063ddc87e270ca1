"""Feed-forward blocks side by side, each with rows of its own."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from motif_kernels import grouped_linear
from motifarch.layers.local_part import local_part
from motifarch.layers.padded_rows import PaddedRows
from motifarch.layers.poly_norm import GroupedPolyNorm

ACTIVATIONS = ("poly_norm", "silu")


class Experts(nn.Module):
    """``down_e(act_e(gate_e(x)) * up_e(x))`` for the rows x of each expert e.

    Parameters: ``gate_up_proj`` (experts, 2 I, E), gate above up; ``down_proj`` (experts, E, I);
    with PolyNorm ``act_fn.weight`` (experts, 3) and ``act_fn.bias`` (experts, 1).

    Attributes:
        grouped_product: what multiplies rows by their experts' matrices,
            :func:`~motif_kernels.grouped_linear` when made. Set another from outside, such as one
            in 8 bits.
        row_multiple: each expert's rows are padded with zeros to a multiple of so many, at least
            one, for a product that needs it; 1, for none, when made.

    Args:
        hidden_size: E.
        num_experts: how many there are.
        intermediate_size: I, the width of an expert's gate and up branches.
        activation: "poly_norm", each expert with its own coefficients, or "silu" (SwiGLU).
        eps: PolyNorm's epsilon; so are the next three its options (see
            :class:`~motifarch.layers.PolyNorm`), and without effect on SwiGLU.
        sigmoid_weight: its weights are ``sigmoid(weight)``.
        output_scale: multiplies it.
        bias_clamp: its bias is used within these bounds.
        hidden_clamp: clamp gate, up and activated product to ``[-hidden_clamp, hidden_clamp]``.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: an activation that is not known.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_experts: int,
        intermediate_size: int,
        activation: str = "poly_norm",
        eps: float = 1e-6,
        sigmoid_weight: bool = False,
        output_scale: float = 1.0,
        bias_clamp: float | None = None,
        hidden_clamp: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(map(repr, ACTIVATIONS))}")
        self.activation, self.hidden_clamp = activation, hidden_clamp
        self.grouped_product: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_linear
        self.row_multiple = 1
        shape = num_experts, 2 * intermediate_size, hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.down_proj = nn.Parameter(
            torch.empty(num_experts, hidden_size, intermediate_size, device=device, dtype=dtype)
        )
        self.act_fn: GroupedPolyNorm | None = None
        if activation == "poly_norm":
            self.act_fn = GroupedPolyNorm(
                num_experts,
                eps=eps,
                sigmoid_weight=sigmoid_weight,
                output_scale=output_scale,
                bias_clamp=bias_clamp,
                hidden_clamp=hidden_clamp,
                device=device,
                dtype=dtype,
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert's matrices as torch.nn.Linear's."""
        for matrices in (self.gate_up_proj, self.down_proj):
            bound = 1 / math.sqrt(matrices.shape[2])
            nn.init.uniform_(matrices, -bound, bound)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Rows x (T, E) of all experts, one expert after the other -> (T, E).

        Args:
            x: sorted by expert.
            offsets: (experts,) int32, where each expert's rows end; of this rank's experts alone,
                where ranks share them. Rows past the last are of no expert: what they hold is not
                used, and gives 0.
        """
        padded = None
        if self.row_multiple > 1:
            padded = PaddedRows(offsets, len(x), self.row_multiple)
            x, offsets = padded.pad(x), padded.offsets
        gate_up = self.grouped_product(x, local_part(self.gate_up_proj), offsets)
        if self.act_fn is not None:
            hidden = self.act_fn(gate_up, None, offsets)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            hidden = self._clamped(F.silu(self._clamped(gate)) * self._clamped(up))
        out = self.grouped_product(hidden, local_part(self.down_proj), offsets)
        return out if padded is None else padded.unpad(out)

    def _clamped(self, t: Tensor) -> Tensor:
        return t if self.hidden_clamp is None else t.clamp(-self.hidden_clamp, self.hidden_clamp)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        experts, twice, size = self.gate_up_proj.shape
        return f"{size}, num_experts={experts}, intermediate_size={twice // 2}, activation={self.activation!r}"
