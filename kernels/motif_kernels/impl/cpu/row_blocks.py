"""Blocks of rows that stay in the processor's cache."""

from collections.abc import Iterator

import torch

# Elements of a block for each thread: half a mebibyte of float32. Smaller blocks lose to the
# overhead of an operator call, larger ones leave the second-level cache.
_BLOCK_ELEMENTS = 1 << 17


def row_blocks(rows: int, row_elements: int) -> Iterator[slice]:
    """Slices of so many rows, each of which takes ``row_elements`` of room."""
    step = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
