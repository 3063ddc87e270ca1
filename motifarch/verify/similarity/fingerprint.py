"""A matrix's fingerprint: how its residual channels go together.

It does not change with what is done on the matrix's other side: heads or neurons in another order,
scaled, or with flipped signs; nor where channels are scaled, as when a norm's weights are moved
into the matrices that read it.

Models that were trained on the same text share some strong directions, such as the one of frequent
tokens. Levelled, these weigh no more than the many weak ones, which training leaves much as the
seed has drawn them.
"""

import torch
from torch import Tensor

_ROUNDS = 8
_LEAST = 16
"""Rows, and channels, below which a Gram matrix says little."""


def fingerprint(rows: Tensor) -> Tensor | None:
    """The levelled Gram matrix of a matrix's channels off the diagonal.

    Args:
        rows: (n, channels).

    Returns:
        (channels * (channels - 1) / 2,), of mean 0 and norm 1; None where there is nothing to
        compare.
    """
    gram = levelled_gram(rows)
    if gram is None:
        return None
    above = torch.ones_like(gram, dtype=torch.bool).triu(diagonal=1)
    return standardised(gram[above])


def levelled_gram(rows: Tensor) -> Tensor | None:
    """The Gram matrix of channels. Before, the matrix is scaled so that all rows and all channels
    have equal norms, which is a canonical form under scaling of both sides (Sinkhorn & Knopp 1967,
    of the squares).

    Args:
        rows: (n, channels).

    Returns:
        (channels, channels); None of few rows or channels, and where not all is finite.
    """
    if min(rows.shape) < _LEAST or not rows.isfinite().all():
        return None
    rows = rows.clone()
    for _ in range(_ROUNDS):
        for axis in (1, 0):
            rows /= rows.norm(dim=axis, keepdim=True).clamp_min(1e-12)
    values, vectors = _spectrum(rows)
    return (vectors * _cut(values, len(rows))) @ vectors.T


def levelled(rows: Tensor) -> Tensor:
    """Rows (n, channels), less their mean, with singular values above the median cut down to it.

    Channels that are permuted or rotated before are so after.
    """
    rows = rows - rows.mean(dim=0)
    values, vectors = _spectrum(rows)
    factors = (_cut(values, len(rows)) / values.clamp_min(1e-12)).sqrt()
    return rows @ (vectors * factors) @ vectors.T


def standardised(vector: Tensor) -> Tensor | None:
    """A vector with mean 0 and norm 1; None where it is constant or not finite."""
    vector = vector - vector.mean()
    norm = vector.norm()
    return vector / norm if norm.isfinite() and norm > 1e-6 else None


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues, in rising order, and eigenvectors of the channels' Gram matrix."""
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    return values.clamp_min(0), vectors


def _cut(values: Tensor, rows: int) -> Tensor:
    """Eigenvalues, at most the median of those that so many rows can have."""
    return values.clamp_max(float(values[-min(rows, len(values)) :].median()))
