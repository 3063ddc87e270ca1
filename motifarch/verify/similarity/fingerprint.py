"""A matrix's fingerprint: how its residual channels go together.

It does not change where what is on the matrix's other side does: heads or neurons in another order,
scaled, or with flipped signs; nor where channels are scaled, as when a norm's weights are moved
into the matrices that read it.
"""

import torch
from torch import Tensor

_ROUNDS = 8
_LEAST_ROWS = 16
"""The Gram matrix of few rows is mostly their signs."""


def fingerprint(rows: Tensor) -> Tensor | None:
    """The Gram matrix of a matrix's channels off the diagonal, the matrix being scaled so that all
    rows and all channels have equal norms: a canonical form under scaling both sides (Sinkhorn &
    Knopp 1967, of the squares).

    Args:
        rows: (n, channels).

    Returns:
        (channels (channels - 1) / 2,), of mean 0 and norm 1; None where there is nothing to compare.
    """
    if len(rows) < _LEAST_ROWS or rows.shape[1] < _LEAST_ROWS:
        return None
    rows = rows.clone()
    for _ in range(_ROUNDS):
        for axis in (1, 0):
            rows /= rows.norm(dim=axis, keepdim=True).clamp_min(1e-12)
    gram = rows.T @ rows
    return standardised(gram[tuple(torch.triu_indices(*gram.shape, offset=1))])


def standardised(vector: Tensor) -> Tensor | None:
    """A vector with mean 0 and norm 1; None where it is constant or not finite."""
    vector = vector - vector.mean()
    norm = vector.norm()
    return vector / norm if norm.isfinite() and norm > 1e-6 else None
