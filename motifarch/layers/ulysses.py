"""A sequence's parts exchanged for heads, so that attention sees it whole (DeepSpeed-Ulysses, arXiv
2309.14509).

Ranks of a group hold consecutive parts of one sequence, and all heads. One all-to-all gives each
rank all of the sequence and its share of the heads; after attention another one brings everything
back.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import all_to_all_single_autograd

from motif_kernels.types import AttentionInputs


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Part i of x's first dimension goes to rank i; what comes is in the order of the ranks."""
    return all_to_all_single_autograd(x.contiguous(), None, None, group)  # type: ignore[no-any-return]


def scatter_heads(tensors: Sequence[Tensor], group: ProcessGroup) -> list[Tensor]:
    """(B, S / n, H, W) each, with heads and widths of their own, to (B, S, H / n, W); one message
    for each dtype.

    Head i goes to rank ``i // (H / n)``: signal heads, noise heads and the keys they share stay
    together.

    Args:
        tensors: this rank's part of the sequence. The same tensor given twice is sent once.
        group: the n ranks.

    Raises:
        ValueError: heads that the ranks cannot share.
    """
    ranks = dist.get_world_size(group)
    for t in tensors:
        if t.shape[2] % ranks:
            raise ValueError(f"{t.shape[2]} heads cannot be shared by the {ranks} ranks of a context-parallel group")
    unique = {id(t): t for t in tensors}
    arrived: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in unique.values()):
        sent = {i: t.unflatten(2, (ranks, -1)).flatten(3) for i, t in unique.items() if t.dtype == dtype}
        widths = [t.shape[3] for t in sent.values()]
        message = torch.cat(list(sent.values()), dim=3).movedim(2, 0)  # (n, B, S / n, widths)
        whole = _exchange(message, group).movedim(0, 1).flatten(1, 2)  # (B, S, widths)
        for i, part in zip(sent, whole.split(widths, dim=-1), strict=True):
            arrived[i] = part.unflatten(-1, (-1, unique[i].shape[3]))
    return [arrived[id(t)] for t in tensors]


def gather_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """(B, S, H / n, W) to (B, S / n, H, W): undoes :func:`scatter_heads` for one tensor."""
    ranks = dist.get_world_size(group)
    message = x.unflatten(1, (ranks, -1)).movedim(1, 0)  # (n, B, S / n, H / n, W)
    return _exchange(message, group).movedim(0, 2).flatten(2, 3)


def scatter_inputs(inputs: AttentionInputs, group: ProcessGroup) -> AttentionInputs:
    """What attention reads, scattered by heads: all but what all tokens and heads share."""
    sent: list[Tensor] = []

    def send(t: Tensor) -> Tensor:
        sent.append(t[..., None] if t.ndim == 3 else t)  # lambda for each token and head lacks a width
        return t

    inputs.map(send)
    arrived = iter(scatter_heads(sent, group))
    return inputs.map(lambda t: next(arrived).squeeze(-1) if t.ndim == 3 else next(arrived))
