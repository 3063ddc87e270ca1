"""Which residual channel of one model is which of another: nobody knows, so ways are tried.

What is found with one half of an anchor's rows (of the tokens, of the pixels) is tested on the
other half, and what is found with some matrices on the others, so that a match is none that was
looked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from motifarch.verify.similarity.fingerprint import levelled

Key = tuple[int, str, int]
"""Layer, what the matrix is called in every layer, and which of its sides."""
How = Literal["as they lie", "permuted", "rotated", "by graph matching"]

MOST_CHANNELS = 256
"""Channels of a model that are compared, drawn once; another's are searched through all of them."""
MOST_ROTATED = 4_096
"""Widths up to which a rotation is looked for, or a graph matched: both take decompositions."""


@dataclass(frozen=True)
class Alignment:
    """One way to find a model's channels in another."""

    how: How
    take: Callable[[Tensor], Tensor]
    """Makes of the other's rows (n, its width) rows (n, channels) in the first one's order."""
    anchor: float | None = None
    """Mean correlation of the anchor's channels on the rows that were held out."""
    found_with: frozenset[Key] = frozenset()
    """Matrices that it was found with, which then show nothing."""


def alignments(channels: Tensor, widths: tuple[int, int], anchors: tuple[Tensor, Tensor] | None) -> list[Alignment]:
    """The ways to try.

    Args:
        channels: of the first model, (c,).
        widths: of both; only equal ones can lie as they are, or be rotated.
        anchors: rows (n, width) of both models that belong together, if there are some.
    """
    ways = []
    if anchors is not None:
        anchors = levelled(anchors[0]), levelled(anchors[1])
    if widths[0] == widths[1]:
        same = Alignment("as they lie", lambda rows: rows[:, channels])
        ways.append(_tested(same, anchors, channels))
    if anchors is None:
        return ways
    one, two = (rows[::2] for rows in anchors)
    held_out = anchors[0][1::2], anchors[1][1::2]
    correlation = columns(one[:, channels]).T @ columns(two)
    ways.append(_tested(_matched(correlation, "permuted"), held_out, channels))
    if widths[0] == widths[1] <= MOST_ROTATED and len(one) >= 2 * widths[0]:
        left, _, right = torch.linalg.svd(two.T @ one)  # orthogonal Procrustes (Schönemann 1966)
        rotation = (left @ right)[:, channels]
        ways.append(_tested(Alignment("rotated", lambda rows: rows @ rotation), held_out, channels))
    return ways


def _matched(correlation: Tensor, how: How) -> Alignment:
    """The assignment (c of all) with the largest sum of |correlation| (c, width)."""
    _, found = linear_sum_assignment(correlation.abs().numpy(), maximize=True)
    index = torch.from_numpy(found)
    sign = correlation.gather(1, index[:, None])[:, 0].sign()
    return Alignment(how, lambda rows: rows[:, index] * sign)


def _tested(way: Alignment, anchors: tuple[Tensor, Tensor] | None, channels: Tensor) -> Alignment:
    if anchors is None:
        return way
    one, two = anchors
    score = (columns(one[:, channels]) * columns(way.take(two))).sum(0).mean()
    return Alignment(way.how, way.take, float(score))


def columns(rows: Tensor) -> Tensor:
    """Columns of mean 0 and norm 1."""
    rows = rows - rows.mean(dim=0)
    return rows / rows.norm(dim=0).clamp_min(1e-12)
