"""Noise heads for an attention module whose heads all have keys and values of their own, as in
vision and diffusion transformers.

Shapes: B batch, Sq queries, Sk keys, H signal heads, Hn noise heads, D width of a head.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from motif_kernels import dispatch
from motif_kernels.combine import combine
from motif_kernels.types import AttentionInputs, AttentionOptions
from motifarch.integrations.noise_heads import ScalarLambda
from motifarch.layers.head_norm import SubNorm, attend_normed
from motifarch.layers.masked_attention import attend_masked


class Heads(NamedTuple):
    """What :class:`SharedNoiseAttention` reads."""

    q: Tensor
    """(B, Sq, H, D)."""
    k: Tensor
    """(B, Sk, H, D)."""
    v: Tensor
    """(B, Sk, H, D)."""
    noise_q: Tensor
    """(B, Sq, Hn, D)."""
    lam: Tensor
    """A scalar."""


class NoiseQueries(nn.Module):
    """Queries of noise heads: (B, S, width) to (B, S, Hn, D).

    Args:
        width: of the tokens that they are made of.
        heads: H, the signal heads.
        head_dim: D.
        ratio: signal heads a noise head; divides H.
        bias: a bias in the projection.
        norm: what normalises queries (..., Hn, D); None for nothing.
        device: where the parameters are made.
        dtype: their dtype.

    Raises:
        ValueError: ratio does not divide the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_dim: int,
        *,
        ratio: int,
        bias: bool,
        norm: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ratio < 1 or heads % ratio:
            fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"ratio={ratio} does not divide the {heads} heads, which are the signal heads; take one of {fitting}"
            )
        self.heads, self.ratio, self.head_dim = heads, ratio, head_dim
        self.proj = nn.Linear(width, heads // ratio * head_dim, bias=bias, device=device, dtype=dtype)
        self.norm = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Queries (B, S, Hn, D) of hidden states (B, S, width)."""
        q = self.proj(hidden_states).unflatten(-1, (-1, self.head_dim))
        return q if self.norm is None else self.norm(q)  # type: ignore[no-any-return]

    def first_of_groups(self, rows: Tensor) -> Tensor:
        """Of a signal projection's weight or bias (H * D, ...) the rows of each group's first head,
        as which a noise head starts.
        """
        return rows.unflatten(0, (self.heads, -1))[:: self.ratio].flatten(0, 1)

    @torch.no_grad()
    def start_as(self, query: nn.Linear) -> None:
        """Starts each noise head as the first head of its group in ``query``."""
        self.proj.weight.copy_(self.first_of_groups(query.weight))
        if query.bias is not None:
            self.proj.bias.copy_(self.first_of_groups(query.bias))


class SharedNoiseAttention(nn.Module):
    """Attention of signal heads, of which each group shares a noise head.

    With A1 a head's map and A2 that of its group's noise head, the head gives ``(A1 - lambda A2)
    V`` (arXiv 2510.06949). The noise head reads the keys of the group's first head; its product
    with all values of the group is one.

    Args:
        head_dim: D.
        lambda_init: the constant in lambda, at which it starts. At 0 it starts as softmax
            attention, and noise queries get a gradient from the second step on.
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``.
        device: where the parameters are made.
        dtype: their dtype.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        lambda_init: float = 0.0,
        sub_norm: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.out_scale = head_dim, 1.0 - lambda_init if sub_norm else 1.0
        self.lambda_vectors = ScalarLambda(head_dim, lambda_init=lambda_init, device=device, dtype=dtype)
        self.subln = SubNorm(head_dim, eps=1e-5, device=device, dtype=dtype) if sub_norm else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        noise_q: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> Tensor:
        """All heads' outputs side by side, (B, Sq, H * D).

        Args:
            q: (B, Sq, H, D).
            k: (B, Sk, H, D).
            v: (B, Sk, H, D).
            noise_q: (B, Sq, Hn, D), from :class:`NoiseQueries`.
            mask: what broadcasts to (B, H, Sq, Sk), as in torch's scaled_dot_product_attention. A
                noise head has that of its group's first head.
            causal: a query sees no key after it; with as many keys as queries.
            dropout: the share of each map's probabilities that are left out.
            scale: multiplies the logits; default ``D ** -0.5``.
        """
        if mask is not None and mask.ndim < 4:
            mask = mask[(None,) * (4 - mask.ndim)]
        options = AttentionOptions.of(self.head_dim, causal=causal, softmax_scale=scale)
        heads = Heads(q, k, v, noise_q, self.lambda_vectors(q))
        attend = partial(_attend, options, mask, dropout)
        return attend_normed(self.subln, self.out_scale, heads, attend).flatten(2)


def _attend(
    options: AttentionOptions,
    mask: Tensor | None,
    dropout: float,
    heads: Heads,
    *,
    norm_weight: Tensor | None,
    norm_eps: float,
    out_scale: float,
) -> Tensor:
    """Attention of both kinds of heads and the epilogue: (B, Sq, H, D)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        inputs = AttentionInputs(q, k, None, None, v, None)
        if mask is None and not dropout:
            return dispatch.attend(inputs, options)[0]
        return attend_masked(inputs, mask, options, dropout)

    group = heads.q.shape[2] // heads.noise_q.shape[2]
    of_noise = mask[:, ::group] if mask is not None and mask.shape[1] > 1 else mask
    values = heads.v.unflatten(2, (-1, group)).flatten(3)  # a group's, side by side
    signal = attend(heads.q, heads.k, heads.v, mask)
    noise = attend(heads.noise_q, heads.k[:, :, ::group], values, of_noise)
    with dispatch.as_given(signal.device):
        return combine(
            signal,
            noise.unflatten(3, (group, -1)).flatten(2, 3),
            heads.lam,
            norm_weight=norm_weight,
            norm_eps=norm_eps,
            out_scale=out_scale,
            gate=None,
        )
