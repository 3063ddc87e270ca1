"""Finds one model's channels in another where no embeddings lead the way: channels are a graph's
nodes, and how each two go together in a matrix is an edge's weight.

Both models' graphs are laid over each other by FAQ (Vogelstein et al. 2015, "Fast approximate
quadratic programming for graph matching"), here of several graphs at once, and of some nodes of one
among all of another, which scipy's quadratic_assignment is not for.
"""

from itertools import product

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from motifarch.progress import progress
from motifarch.verify.similarity.alignment import columns

_ROUNDS = 30
_QUANTILES = 33
_SHARES = 0.5, 0.25
"""Of the plan that a search starts with, what channels alone say; the rest is any with any."""
_STILL = 1e-3
"""A step so short ends the search."""


def match_graphs(one: Tensor, two: Tensor, norms: tuple[Tensor, Tensor], channels: Tensor) -> tuple[Tensor, Tensor]:
    """Matches channels by how they go together in several matrices, whatever their signs.

    Args:
        one: levelled Gram matrices of the first model, (matrices, width, width); what is on their
            diagonals does not count.
        two: of the same matrices of the other, (matrices, its width, its width), no narrower.
        norms: logarithms of the channels' norms, in more matrices, (more, width) of both.
        channels: those of the first model to find, (c,).

    Returns:
        The other's channel for each, (c,), and whether its sign is the same, (c,) of 1 and -1.
    """
    one, two = (grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2)) for grams in (one, two))
    edges = _edges(one)[:, channels][:, :, channels], _edges(two)
    by_edges, by_norms = (
        a[:, channels].T @ b for a, b in zip(_features(one, norms[0]), _features(two, norms[1]), strict=True)
    )
    # Each start ends in some optimum; the true one, if there is one, stands out.
    starts = list(product((by_edges + by_norms, by_edges, by_norms), _SHARES))
    plans = []
    with progress("laying channels over each other", len(starts), of="starts") as advance:
        for first, share in starts:
            plans.append(_climbed(edges, share * _assigned(first) + (1 - share) / first.shape[1]))
            advance()
    best = max(plans, key=lambda plan: float((_gradient(edges, plan) * plan).sum()))
    found = best.argmax(dim=1)
    pairs = zip(one, two, strict=True)
    alike = torch.stack([a[channels][:, channels] * b[found][:, found] for a, b in pairs]).sum(dim=0)
    # Signs that make as many products as can be positive are those of the leading eigenvector.
    signs = torch.linalg.eigh(alike)[1][:, -1]
    return found, torch.where(signs < 0, -1.0, 1.0)


def _climbed(edges: tuple[Tensor, Tensor], plan: Tensor) -> Tensor:
    """The assignment that a plan (c, width), its rows of sum 1, leads to."""
    for _ in range(_ROUNDS):
        gradient = _gradient(edges, plan)
        step = _assigned(gradient) - plan
        # What is maximised is a parabola along the step.
        bend, slope = (_gradient(edges, step) * step).sum(), 2 * (gradient * step).sum()
        length = 1.0 if bend >= 0 else float((-slope / (2 * bend)).clamp_max(1))
        plan = plan + length * step
        if length * step.norm() < _STILL:
            break
    return _assigned(plan)


def _gradient(edges: tuple[Tensor, Tensor], plan: Tensor) -> Tensor:
    """Half of that of how alike edges are under a plan."""
    return torch.stack([a @ plan @ b for a, b in zip(*edges, strict=True)]).sum(dim=0)


def _assigned(likeness: Tensor) -> Tensor:
    """The assignment of rows to columns with the largest sum, as a matrix of ones and zeros."""
    rows, columns = linear_sum_assignment(likeness.numpy(), maximize=True)
    plan = torch.zeros_like(likeness)
    plan[rows, columns] = 1
    return plan


def _edges(grams: Tensor) -> Tensor:
    """Magnitudes, of mean 0 and norm 1 in each graph."""
    found = grams.abs() - grams.abs().mean(dim=(1, 2), keepdim=True)
    return found / found.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)


def _features(grams: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """What tells a channel alone: the weights of its edges and its norms, (..., width)."""
    at = torch.linspace(0, grams.shape[-1] - 1, _QUANTILES).round().long()
    edges = torch.cat([gram.abs().sort(dim=0).values[at] for gram in grams])
    return columns(edges - edges.mean(dim=1, keepdim=True)), columns(norms - norms.mean(dim=1, keepdim=True))
