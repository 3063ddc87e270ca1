"""The values of one attention call: made once, handed from the layers to the kernels.

Fields are in the order of the torch operators' arguments, whose schemas are made from them: a new
option is a field here. This module needs torch alone and imports nothing of the package.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """What differential attention has beside softmax attention."""

    q: Tensor
    k: Tensor
    lam: Tensor


class AttentionInputs(NamedTuple):
    """The tensors of a call: a batch (B, S, heads, width) or packed documents (total, heads,
    width).

    Names and shapes are those of :func:`motif_kernels.diff_attn_func`. Softmax attention has no q2,
    k2 and lam. Of a cache, k1, k2 and v are what it holds.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor | None
    k2: Tensor | None
    v: Tensor
    lam: Tensor | None
    norm_weight: Tensor | None = None
    gate: Tensor | None = None

    @property
    def noise(self) -> Noise | None:
        """The noise map's tensors, or None for softmax attention."""
        if self.q2 is None or self.k2 is None or self.lam is None:
            return None
        return Noise(self.q2, self.k2, self.lam)

    @property
    def noise_heads(self) -> int:
        """Hn, 0 for softmax attention."""
        return 0 if self.q2 is None else self.q2.shape[-2]

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self)

    def map(
        self, per_query: Callable[[Tensor], Tensor], per_key: Callable[[Tensor], Tensor] | None = None
    ) -> "AttentionInputs":
        """With functions of what has a row for each query, and of keys and values.

        Keys that are one tensor stay one.

        Args:
            per_query: of q1, q2, the gate, and lambda if it has one number for each token and head.
            per_key: of k1, k2 and v; default per_query.
        """
        per_key = per_query if per_key is None else per_key
        k1 = per_key(self.k1)
        shared = self.k2 is self.k1
        return self._replace(
            q1=per_query(self.q1),
            k1=k1,
            q2=None if self.q2 is None else per_query(self.q2),
            k2=None if self.k2 is None else k1 if shared else per_key(self.k2),
            v=per_key(self.v),
            lam=None if self.lam is None else per_query(self.lam) if self.lam.ndim > 1 else self.lam,
            gate=None if self.gate is None else per_query(self.gate),
        )


class Sequences(NamedTuple):
    """Where the sequences of a call lie: each row of a batch is one, or each packed document."""

    max_seqlen_q: int
    max_seqlen_k: int
    cu_seqlens_q: Tensor | None = None
    """(documents + 1,) int32 bounds in the packed queries; None for a batch."""
    cu_seqlens_k: Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether they are packed documents."""
        return self.cu_seqlens_q is not None


class Cache(NamedTuple):
    """What rows of a key/value cache hold, and how it is read."""

    lengths: Tensor
    """(B,) int32, the tokens of each row, left padding and the queries' own included."""
    leftpad: Tensor | None = None
    """(B,) int32, tokens at the start of each row that are masked."""
    block_table: Tensor | None = None
    """(B, blocks of a row) int32: which blocks hold a row's tokens, in order."""
    num_splits: int | None = None
    """Into how many parts the kernel cuts a row; None for enough to fill the GPU."""

    def capacity(self, keys: Tensor) -> int:
        """Tokens that a row has room for, in a cache of these keys (blocks, with a table)."""
        return keys.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


_FAR = 1 << 30  # further than any key; added to a position, 32 bits still hold it


class AttentionOptions(NamedTuple):
    """The numbers of a call. What has a default, a backend may not serve (``dispatch.py``)."""

    softmax_scale: float
    left: int
    """Keys seen to the left of a query's position, -1 for all."""
    right: int
    """Likewise to the right; 0 is causal."""
    norm_eps: float
    out_scale: float
    deterministic: bool
    softcap: float = 0.0
    return_max_logits: bool = False

    @classmethod
    def of(
        cls,
        head_dim: int,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        norm_eps: float = 1e-5,
        out_scale: float = 1.0,
        deterministic: bool = True,
        return_max_logits: bool = False,
    ) -> "AttentionOptions":
        """From the public functions' arguments: with the default scale, and causal as a window."""
        left, right = window_size
        return cls(
            head_dim**-0.5 if softmax_scale is None else softmax_scale,
            min(left, _FAR),
            0 if causal else min(right, _FAR),
            norm_eps,
            out_scale,
            deterministic,
            softcap,
            return_max_logits,
        )

    @property
    def window_size(self) -> tuple[int, int]:
        """(left, right), FlashAttention's."""
        return self.left, self.right


class Results(NamedTuple):
    """What the fused forward pass leaves; what was not asked for is empty. T tokens."""

    out: Tensor
    """(B, S, Hs, Dv), or (total, Hs, Dv)."""
    difference: Tensor
    """(T, Hs, Dv): signal - lambda * noise, rounded; empty where that is the output."""
    noise: Tensor
    """(T, Hn, Dv): the noise map's output, rounded."""
    lse_signal: Tensor
    """(Hs, T) float32, in units of log2."""
    lse_noise: Tensor
    """(Hn, T)."""
    inverse_rms: Tensor
    """(Hs, T), with the sub-norm."""
    max_signal: Tensor
    """(Hs,)."""
    max_noise: Tensor
    """(Hn,)."""


class Gradients(NamedTuple):
    """What the fused backward pass leaves; absent ones are empty."""

    q1: Tensor
    k1: Tensor
    """Of both maps, where k1 serves both."""
    q2: Tensor
    k2: Tensor
    """Empty where k1 serves both maps."""
    v: Tensor
    lam: Tensor
    """(T, Hs), of each token and head."""
    norm_weight: Tensor
    gate: Tensor
