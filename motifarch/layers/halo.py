"""The keys that a window reaches back to, from the ranks that hold them: context parallelism of
layers with a window.

Ranks of a group hold consecutive parts of one sequence. A query sees no further back than its
window, so each rank needs only the last keys and values before its part, its halo: the window's
length times their bytes, however long the sequence is. Most come from the rank before, more ranks
send where the window is longer than a part.

One all-to-all with exact splits brings them. Between neighbours alone it is a send and a receive;
it serves several neighbours alike, and torch differentiates it: the backward pass sends keys'
gradients back.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd

from motif_kernels.types import Sequences


def halo_length(tokens: int, left: int, rank: int) -> int:
    """How many tokens before its part a rank needs: the window's, but no more than there are."""
    return min(left, rank * tokens)


def add_halo(x: Tensor, left: int, group: ProcessGroup) -> Tensor:
    """This rank's part of a sequence with what a window sees before it, (B, n, ...) to
    (B, halo + n, ...).

    Args:
        x: the tokens of this rank, as many as every other rank has.
        left: how far back a token sees.
        group: the ranks, in the order of the sequence.
    """
    rank, ranks, tokens = dist.get_rank(group), dist.get_world_size(group), x.shape[1]

    def needed(distance: int) -> int:
        """Of a rank so many parts before another's: the last tokens, which that one sees."""
        return max(0, min(tokens, left - (distance - 1) * tokens)) if distance > 0 else 0

    sent = [needed(other - rank) for other in range(ranks)]
    received = [needed(rank - other) for other in range(ranks)]
    rows = x.movedim(1, 0)
    message = torch.cat([rows[tokens - count :] for count in sent])
    halo = all_to_all_single_autograd(message, received, sent, group)
    # Also where there is no halo: every rank takes part in the backward pass.
    return torch.cat((halo.movedim(0, 1), x), dim=1)


def add_halos(tensors: Sequence[Tensor], left: int, group: ProcessGroup) -> list[Tensor]:
    """Several tensors (B, n, heads, width) as :func:`add_halo`, in one message."""
    widths = [t.shape[2:].numel() for t in tensors]
    whole = add_halo(torch.cat([t.flatten(2) for t in tensors], dim=-1), left, group)
    parts = zip(tensors, whole.split(widths, dim=-1), strict=True)
    return [part.unflatten(2, t.shape[2:]) for t, part in parts]


def documents_with_halo(documents: Sequences, tokens: int, left: int, group: ProcessGroup) -> Sequences:
    """Bounds of a whole row's packed documents in this rank's queries, and in its halo and keys.

    A document of other ranks is empty here; one that ends in the halo has keys and no query. Both
    end at one token otherwise, so a window counted from the last one stands right.

    Args:
        documents: of the row, over all ranks.
        tokens: how many this rank has.
        left: how far back a token sees.
        group: the ranks.
    """
    assert documents.cu_seqlens_q is not None
    rank = dist.get_rank(group)
    halo, bounds = halo_length(tokens, left, rank), documents.cu_seqlens_q - rank * tokens
    return Sequences(
        min(documents.max_seqlen_q, tokens),
        min(documents.max_seqlen_k, halo + tokens),
        bounds.clamp(0, tokens),
        (bounds + halo).clamp(0, halo + tokens),
    )
