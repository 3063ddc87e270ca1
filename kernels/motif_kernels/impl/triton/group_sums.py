"""Sums over the rows of each group, in a fixed order: no atomics.

A program serves a group. Its lanes each add up every so many rows, and are added up at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import launch, next_power_of_2

_ROWS = 1024


@triton.jit(do_not_specialize=["row_count"])
def _group_sums_kernel(
    numbers_pointer,
    offsets_pointer,
    sums_pointer,
    row_count,
    KINDS: tl.constexpr,
    PADDED_KINDS: tl.constexpr,
    ROWS: tl.constexpr,
):
    group, kinds, lane = tl.program_id(0), tl.arange(0, PADDED_KINDS), tl.arange(0, ROWS)
    start = tl.load(offsets_pointer + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets_pointer + group)
    of_kind = (kinds < KINDS)[:, None]
    pointers = numbers_pointer + kinds.to(tl.int64)[:, None] * row_count
    total = tl.zeros([PADDED_KINDS, ROWS], numbers_pointer.dtype.element_ty)
    for first in range(start, end, ROWS):
        rows = (first + lane)[None, :]
        total += tl.load(pointers + rows, mask=of_kind & (rows < end), other=0.0)
    tl.store(sums_pointer + group * KINDS + kinds, tl.sum(total, axis=1), mask=kinds < KINDS)


def group_sums(numbers: Tensor, offsets: Tensor) -> Tensor:
    """Numbers (K, R) of rows that are sorted by group, added up over each group's: (E, K).

    Args:
        numbers: contiguous.
        offsets: (E,) int32, where each group's rows end; past the last they are of none.
    """
    kinds, rows = numbers.shape
    sums = torch.empty(len(offsets), kinds, dtype=numbers.dtype, device=numbers.device)
    launch(
        _group_sums_kernel,
        (len(offsets),),
        numbers,
        offsets.contiguous(),
        sums,
        rows,
        KINDS=kinds,
        PADDED_KINDS=next_power_of_2(kinds),
        ROWS=_ROWS,
        num_warps=8,
    )
    return sums
