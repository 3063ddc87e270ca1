"""Sums over the rows of each group, on the CPU."""

from torch import Tensor

from motif_kernels.reference import rows_of_groups


def group_sums(numbers: Tensor, offsets: Tensor) -> Tensor:
    """Numbers (K, R) of rows that are sorted by group, added up over each group's: (E, K).

    Args:
        numbers: 0 in rows of no group.
        offsets: (E,) int32, where each group's rows end; past the last they are of none.
    """
    group, _ = rows_of_groups(offsets, numbers.shape[1])
    return numbers.new_zeros(len(offsets), len(numbers)).index_add_(0, group, numbers.T)
