"""How the factor that a head's logits are clipped by is shared out between its query and a key that
other heads use too.

Of G query heads on one key head, head h's logits are to be multiplied by gamma_h: tau / S_h above
the bound, 1 below it. With gamma the smallest of the group's, let the key take ``gamma^r``. Logits
are linear in both, so query h must take::

    gamma_h / gamma^r

which gives every head exactly its gamma_h: those above the bound land on it, and those below
compute what they did, for where the key shrank their queries grow by ``gamma^-r``. The head with
the group's smallest factor takes ``gamma^(1 - r)``.

**Which r.** Let the logarithms of the key and of each query grow by g a step, a query's by chance,
with all heads at the bound. A head is cut by what it grew, and the key by r times the group's
largest: its own growth g and the largest of G queries', about ``sqrt(G) g`` (for exponential
chances ``(1 + 1/2 + ... + 1/G) g``: 2.28 g for G = 5, whose root is 2.24). So a shared key keeps
its size where ``r (1 + sqrt(G)) = 1``. With r = 1/2 it loses more than it grows for every G above
1: it shrinks geometrically, to nothing, and queries grow by as much.

Motif-3 is published with this r, and with ``gamma^(1 - r)`` for queries. Read as each head's own
gamma_h, that is the same for the head with the smallest; another head's logits are multiplied by
``gamma_h^(1 - r) gamma^r``, less than gamma_h, and where a part of its logits has another key (the
rotary key of latent attention) that part alone is right. Here no head pays for another.

Source: Motif-3, arXiv 2608.09119 (the split); the choice of the queries' factors is ours.
"""

import math
from typing import Literal

import torch

Split = Literal["query", "symmetric", "asymmetric"]
"""What a key that G heads share takes: nothing, half (to compare with: keys go to zero), or
1 / (1 + sqrt(G)) of the exponent. A key of one head alone takes half.
"""


def key_exponent(heads: int, split: Split) -> float:
    """The part r of a factor's exponent that a key head of so many query heads takes.

    Raises:
        ValueError: an unknown split.
    """
    exponents = {"query": 0.0 if heads > 1 else 0.5, "symmetric": 0.5, "asymmetric": 1 / (1 + math.sqrt(heads))}
    if split not in exponents:
        raise ValueError(f"split is {split!r}; accepted are {', '.join(exponents)}")
    return exponents[split]


def split_gamma(gamma: torch.Tensor, key_heads: int, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of query heads (H,) and of the key heads that they use, (key_heads,).

    Query heads are in the order of their keys, H / key_heads on each; a group whose heads all have
    a factor of 1 has ones everywhere.
    """
    groups = gamma.view(key_heads, -1)
    key = groups.amin(dim=1) ** key_exponent(groups.shape[1], split)
    return (groups / key[:, None]).flatten(), key
