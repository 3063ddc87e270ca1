"""Room for each expert's rows in whole multiples, as products in 8 bits need it."""

import torch
from torch import Tensor


class PaddedRows:
    """Rows sorted by expert, each expert's filled up with rows of zeros; and back.

    Zeros enter no scale of a block, no product and no gradient of a weight, and what becomes of
    them is dropped. An expert without rows gets some, for no product over an empty group to have an
    undefined value. Nothing waits for the device: the number of rows is a bound, and those past the
    last expert's are of none.

    Args:
        offsets: (experts,) int32, where each expert's rows end. Rows past the last are of no
            expert: what they hold enters nothing, and they come back as 0.
        rows: how many there are.
        multiple: of how many rows each expert gets a multiple, at least one.
    """

    def __init__(self, offsets: Tensor, rows: int, multiple: int) -> None:
        experts = len(offsets)
        counts = offsets.diff(prepend=offsets.new_zeros(1))
        sizes = counts.add(multiple - 1).div(multiple, rounding_mode="floor").clamp(min=1) * multiple
        self.offsets = sizes.cumsum(0, dtype=torch.int32)
        """(experts,) int32, where each expert's padded rows end."""
        begins, padded_begins = offsets - counts, self.offsets - sizes

        place = torch.arange(multiple * (-(-rows // multiple) + experts), device=offsets.device)
        expert = torch.searchsorted(self.offsets, place, right=True).clamp(max=experts - 1)
        row = place - padded_begins[expert] + begins[expert]
        self._row_at = row.where(row < offsets[expert], -1)

        row = torch.arange(rows, device=offsets.device)
        expert = torch.searchsorted(offsets, row, right=True)
        of_one = expert < experts
        expert = expert.clamp(max=experts - 1)
        self._place_of = (row - begins[expert] + padded_begins[expert]).where(of_one, -1)

    def pad(self, x: Tensor) -> Tensor:
        """Rows (T, E) to padded ones (P, E)."""
        return _Take.apply(x, self._row_at, self._place_of)  # type: ignore[no-any-return, no-untyped-call]

    def unpad(self, x: Tensor) -> Tensor:
        """Padded rows (P, E) to (T, E)."""
        return _Take.apply(x, self._place_of, self._row_at)  # type: ignore[no-any-return, no-untyped-call]


class _Take(torch.autograd.Function):
    """``x[index]``, 0 where that is -1, whose gradient is taken by the inverse: both are gathers.

    What is not taken may be NaN, and so may its gradient: neither is multiplied by anything.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        if not len(x):
            return x.new_zeros(len(index), x.shape[1])
        return x[index.clamp(min=0)].masked_fill_((index < 0)[:, None], 0)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        index, inverse = ctx.saved_tensors  # type: ignore[attr-defined]
        return _Take.apply(grad, inverse, index), None, None  # type: ignore[no-untyped-call]
