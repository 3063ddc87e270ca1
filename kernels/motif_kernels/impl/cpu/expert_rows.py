"""Tokens' rows for experts on the CPU. Beside the results only blocks of tokens are in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.impl.cpu.row_blocks import row_blocks


def sort_by_expert(selected: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """As :func:`motif_kernels.reference_routing.sort_by_expert`."""
    keys = selected.where((selected >= 0) & (selected < num_experts), num_experts).flatten()
    ends = torch.bincount(keys, minlength=num_experts + 1)[:num_experts].cumsum(0, dtype=torch.int32)
    if num_experts < torch.iinfo(torch.int16).max:
        keys = keys.short()  # sorted by its digits, in a fifth of the time
    order = keys.sort(stable=True).indices
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order))
    return places.view(selected.shape), ends


def dispatch(x: Tensor, places: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """As :func:`motif_kernels.reference_routing.dispatch`."""
    tokens, slots = places.shape
    token = torch.empty(tokens * slots, dtype=torch.int64)
    token[places.flatten()] = torch.arange(tokens).repeat_interleave(slots)
    end = int(offsets[-1])
    out = x.new_empty(rows, x.shape[1])
    torch.index_select(x, 0, token[:end], out=out[:end])
    out[end:] = 0
    return out


def combine(rows: Tensor, weights: Tensor | None, places: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """As :func:`motif_kernels.reference_routing.combine`, rounded once to ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    out = rows.new_empty(len(places), rows.shape[1], dtype=dtype)
    same = rows.dtype == wide
    # Rows of another dtype are widened a block at a time.
    for block in row_blocks(len(places), 0 if same else places.shape[1] * rows.shape[1]):
        real = places[block] < offsets[-1]
        counts, index = real.sum(dim=1), places[block][real]
        scales = None if weights is None else weights[block][real].to(wide)
        source = rows
        if not same:
            source, index = rows.index_select(0, index).to(wide), torch.arange(len(index))
        out[block] = _bags(source, index, counts.cumsum(0) - counts, scales)
    return out


def _bags(rows: Tensor, index: Tensor, starts: Tensor, scales: Tensor | None) -> Tensor:
    """Sums of ``scales * rows[index]`` over the runs that begin at ``starts``, each in order."""
    if not len(rows):
        return rows.new_zeros(len(starts), rows.shape[1])
    return F.embedding_bag(index, rows, starts, mode="sum", per_sample_weights=scales)


def combine_backward(
    grad: Tensor, rows: Tensor, weights: Tensor, places: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and weights."""
    end = int(offsets[-1])
    drows, dweights = torch.empty_like(rows, memory_format=torch.contiguous_format), torch.zeros_like(weights)
    drows[end:] = 0
    for block in row_blocks(len(places), places.shape[1] * rows.shape[1]):
        real = places[block] < end
        index, g = places[block][real], grad[block].index_select(0, real.nonzero()[:, 0])
        dweights[block][real] = (rows.index_select(0, index) * g).sum(dim=1).to(weights.dtype)
        drows.index_copy_(0, index, g.mul_(weights[block][real][:, None]).to(rows.dtype))
    return drows, dweights
