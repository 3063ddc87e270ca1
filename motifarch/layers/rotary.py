"""Rotary position embeddings (RoFormer, arXiv 2104.09864), rotate-half."""

import torch
from torch import Tensor, nn

from motif_kernels.ops import is_exporting

PositionEmbeddings = tuple[Tensor, Tensor]


class RotaryEmbedding(nn.Module):
    """Tables of cosines and sines for given positions.

    They have the shape and order that transformers' models pass around, so that either side's
    tables fit the other's layers.

    Args:
        head_dim: width D of a query/key head; even.
        base: theta, the wavelength base.
        inv_freq: (D / 2,) inverse frequencies that replace the default ``base ** (-2i / D)``
            (for YaRN and other scalings).
        attention_scaling: multiplies both tables.

    Raises:
        ValueError: head_dim is odd, or inv_freq has another length.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        inv_freq: Tensor | None = None,
        attention_scaling: float = 1.0,
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotary embeddings rotate pairs, so it must be even")
        if inv_freq is not None and tuple(inv_freq.shape) != (head_dim // 2,):
            raise ValueError(
                f"inv_freq has shape {tuple(inv_freq.shape)}; it must be ({head_dim // 2},), half of head_dim"
            )
        self.head_dim, self.base, self.attention_scaling = head_dim, base, attention_scaling
        # Plain attributes, not buffers: a buffer would be lost in meta-device construction and
        # rounded by model.bfloat16().
        self._inv_freq = None if inv_freq is None else inv_freq.detach()
        self._in_use: Tensor | None = None

    def inverse_frequencies(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (D / 2,) angles a position adds."""
        if self._inv_freq is not None and is_exporting():
            return self._inv_freq.to(device=device, dtype=dtype)  # a constant of the program
        if self._inv_freq is not None:
            if self._in_use is None or (self._in_use.device, self._in_use.dtype) != (device, dtype):
                self._in_use = self._inv_freq.to(device=device, dtype=dtype)
            return self._in_use
        exponents = torch.arange(0, self.head_dim, 2, device=device, dtype=dtype) / self.head_dim
        return self.base**-exponents

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype | None = None) -> PositionEmbeddings:
        """Cosines and sines of each position's angles, the second half of the width repeating the
        first.

        Args:
            position_ids: (B, S) or (1, S) integer positions.
            dtype: float64 for a float64 model; tables are float32 otherwise, whatever the model
                computes in.

        Returns:
            Two tensors (B, S, D).
        """
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        angles = position_ids[..., None].to(dtype) * self.inverse_frequencies(position_ids.device, dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"head_dim={self.head_dim}, base={self.base}"


def apply_rotary(x: Tensor, position_embeddings: PositionEmbeddings) -> Tensor:
    """Rotate each head of x by its position's angles, in the tables' precision; rounded once to x's
    dtype.

    Args:
        x: (B, S, H, D).
        position_embeddings: cosines and sines, (B, S, D) or (1, S, D).
    """
    half = x.shape[-1] // 2
    # The halves of the tables repeat each other, so half a table serves.
    cos, sin = (t[..., None, :half] for t in position_embeddings)
    first, second = x[..., :half], x[..., half:]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def rotate_heads(q: Tensor, k: Tensor, position_embeddings: PositionEmbeddings) -> tuple[Tensor, Tensor]:
    """Queries and keys with :func:`apply_rotary`; joined where they are few and gradients are off,
    as in decoding, for there calls cost more than the copy.

    Args:
        q: (B, S, H, D).
        k: (B, S, Hk, D).
        position_embeddings: cosines and sines, (B, S, D) or (1, S, D).
    """
    if torch.is_grad_enabled() or q.shape[1] > 1:
        return apply_rotary(q, position_embeddings), apply_rotary(k, position_embeddings)
    heads = [q.shape[2], k.shape[2]]
    rotated_q, rotated_k = apply_rotary(torch.cat((q, k), dim=2), position_embeddings).split(heads, dim=2)
    return rotated_q, rotated_k
