"""How many samples each step's global batch holds: a linear warm-up, then constant."""

from bisect import bisect_right
from itertools import accumulate

from motifarch.errors import UserError


class BatchSchedule:
    """Batch size as a function of the step, with exact prefix sums that need no loop over steps.

    The batch grows from ``start`` at step 0 to ``size`` at step ``warmup_steps``, linearly and
    rounded down to whole multiples of ``multiple``, and stays at ``size``.

    Args:
        size: samples in a batch after the warm-up.
        start: samples in the first batch (default: ``size``), where there is a warm-up.
        warmup_steps: steps until the full size is reached.
        multiple: of so many samples every batch is a multiple, such as ranks x micro-batch size.

    Raises:
        UserError: sizes are no positive multiples of ``multiple``, or the batch would shrink.
    """

    def __init__(self, size: int, *, start: int | None = None, warmup_steps: int = 0, multiple: int = 1) -> None:
        start = size if start is None else start
        if multiple < 1:
            raise UserError(f"batch multiple={multiple} must be at least 1")
        if warmup_steps < 0:
            raise UserError(f"batch warm-up of {warmup_steps} steps: must be 0 or more")
        for name, value in (("batch size", size), ("starting batch size", start)):
            if value < 1 or value % multiple:
                raise UserError(
                    f"{name} {value} must be a positive multiple of {multiple}: "
                    f"take {max(1, round(value / multiple)) * multiple}"
                )
        if start > size:
            raise UserError(f"starting batch size {start} exceeds the final {size}: the batch only grows; lower it")
        self.size = size
        self.start = start if warmup_steps else size
        self.warmup_steps = warmup_steps
        self.multiple = multiple

        # A staircase, whose stair k covers the steps from _stair_starts[k] up to the next stair.
        self._climbs = (size - self.start) // multiple
        self._stair_starts = [-(-k * warmup_steps // self._climbs) for k in range(1, self._climbs + 1)]
        self._stair_starts.insert(0, 0)
        lengths = [
            (end - begin, (begin + end - 1) * (end - begin) // 2)
            for begin, end in zip(self._stair_starts, self._stair_starts[1:], strict=False)
        ]
        heights = [self.start + k * multiple for k in range(self._climbs)]
        self._samples = list(accumulate((h * n for h, (n, _) in zip(heights, lengths, strict=True)), initial=0))
        self._step_sums = list(accumulate((h * s for h, (_, s) in zip(heights, lengths, strict=True)), initial=0))

    def batch_size(self, step: int) -> int:
        """Samples in the global batch of ``step`` (counted from 0)."""
        if step >= self.warmup_steps:
            return self.size
        return self.start + self.multiple * (step * self._climbs // self.warmup_steps)

    def samples_before(self, step: int) -> int:
        """Samples in all batches before ``step``."""
        return self.prefix_sums(step)[0]

    def prefix_sums(self, step: int) -> tuple[int, int]:
        """The exact sums over all earlier steps s of ``batch_size(s)`` and ``s * batch_size(s)``.

        The second is what the integral of a weight that is linear in the step needs.
        """
        stair = bisect_right(self._stair_starts, step) - 1
        begin = self._stair_starts[stair]
        height = self.start + stair * self.multiple
        samples = self._samples[stair] + height * (step - begin)
        step_sum = self._step_sums[stair] + height * ((begin + step - 1) * (step - begin) // 2)
        return samples, step_sum
