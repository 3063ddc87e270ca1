"""Moving a layer's lambda by a given amount, exactly, through its four vectors."""

import math

import torch
from torch import Tensor

_BISECTIONS = 200
_SPARK = 1e-4
"""Length given to a direction that two vectors do not have, so that it can be scaled."""
_LARGEST_REPAIR = 0.01
"""Of the largest number in a vector: what rounding may add to one of its places."""


def shift_lambda(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, shift: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors (D,) whose ``exp(q1 . k1) - exp(q2 . k2)`` is larger by ``shift``, as near to the old
    ones as possible and of their dtype.

    ``exp(q2 . k2)`` falls by the shift if it stays positive; otherwise ``exp(q1 . k1)`` grows by
    it, which it then can, for the shift is positive.
    """
    second = math.exp(_dot(q2, k2)) - shift
    if second > 0:
        return q1, k1, *with_dot(q2, k2, math.log(second))
    return *with_dot(q1, k1, math.log(math.exp(_dot(q1, k1)) + shift)), q2, k2


def with_dot(q: Tensor, k: Tensor, target: float) -> tuple[Tensor, Tensor]:
    """The pair of vectors (D,) nearest to (q, k), in the sum of squares, whose dot product is
    ``target``; of their dtype, rounded together so that the product is kept.

    With ``u = q + k`` and ``v = q - k`` the product is ``(|u|^2 - |v|^2) / 4``, and the nearest
    pair scales each: ``u / (1 - m)`` and ``v / (1 + m)`` for the one m between -1 and 1 that gives
    the product (the condition of Lagrange). Neither vector may vanish by that, and a zero vector
    can grow: the edit has no singularity where q or k is small.
    """
    u, v = _present(q.double() + k.double(), k), _present(q.double() - k.double(), q)
    uu, vv = float(u @ u), float(v @ v)
    low, high = -1.0, 1.0
    for _ in range(_BISECTIONS):
        m = (low + high) / 2
        if m in (low, high):
            break
        if uu / (1 - m) ** 2 - vv / (1 + m) ** 2 < 4 * target:
            low = m
        else:
            high = m
    m = (low + high) / 2
    u, v = u / (1 - m), v / (1 + m)
    return round_pair((u + v) / 2, (u - v) / 2, q.dtype)


def round_pair(q: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two float64 vectors (D,) rounded to a dtype so that their dot product is kept.

    The product's terms are rounded one after another, from the largest to the smallest. Each makes
    up for what those before it lost in the smaller of its two places, whose rounding is the finer:
    what is left at the end is a rounding of the smallest term alone. (A term too small to make up
    for anything passes it on.)
    """
    rounded = torch.stack([q, k]).to(dtype)
    largest = _LARGEST_REPAIR * float(torch.maximum(q.abs(), k.abs()).max())
    lost = 0.0
    for i in (q * k).abs().argsort(descending=True).tolist():
        exact, term = (float(q[i]), float(k[i])), float(q[i] * k[i]) + lost
        fine = int(abs(exact[1]) < abs(exact[0]))
        factor = float(rounded[1 - fine, i])
        if factor and abs(term / factor - exact[fine]) <= largest:
            rounded[fine, i] = term / factor
        lost = term - float(rounded[0, i]) * float(rounded[1, i])
    return rounded[0], rounded[1]


def _dot(q: Tensor, k: Tensor) -> float:
    return float(q.double() @ k.double())


def _present(direction: Tensor, other: Tensor) -> Tensor:
    """A direction of some length: this one's, else another vector's, else one of our own."""
    if float(direction.norm()) > _SPARK * 1e-3:
        return direction
    # Places of falling size, the last of which can make up for what rounding takes from the others.
    own = 1.0 / torch.arange(1, len(direction) + 1, dtype=torch.float64)
    other = other.double() if float(other.norm()) else own
    return direction + _SPARK * other / other.norm()
