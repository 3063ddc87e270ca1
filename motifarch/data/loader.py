"""One rank's micro-batches, read ahead in a background thread."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from motifarch.data.balance import deal
from motifarch.data.collation import collate
from motifarch.data.mixture import Mixture
from motifarch.errors import UserError

MicroBatches = list[dict[str, Any]]


@dataclass(eq=False)
class BatchLoader:
    """Iterates over the steps of a run, giving one rank its part of each global batch.

    The ranks' rows, put together, are the mixture's global batch: what a step sees does not depend
    on the number of ranks, nor on the step at which a run was resumed. They are in rank order,
    unless ranks are to be balanced. A row takes tens of microseconds to read and check, its lengths
    alone a few, so one thread is enough.

    Raises:
        UserError: if a batch size of the steps asked for does not divide by ``world_size``.
    """

    mixture: Mixture
    """The sampler; its components' datasets are read here."""
    _: KW_ONLY
    rank: int
    """This rank's number among those that see different data."""
    world_size: int
    """How many such ranks there are."""
    micro_batch_size: int
    """Most rows in one model call."""
    start_step: int
    stop_step: int
    """The step to stop before."""
    prefetch: int = 2
    """Steps read ahead."""
    row_work: Callable[[np.ndarray], int] | None = None
    """What a row with documents of these lengths costs, by which rows are dealt to ranks so that
    all are equally busy (`motifarch.data.balance`); None deals them in order. Every rank reads the
    lengths of all rows of a step then, and computes the same deal.
    """

    def __post_init__(self) -> None:
        """Checks the sizes."""
        schedule, ranks = self.mixture.batch_schedule, self.world_size
        if not 0 <= self.rank < ranks:
            raise UserError(f"rank {self.rank} of {ranks} ranks: it must lie between 0 and {ranks - 1}")
        if self.micro_batch_size < 1:
            raise UserError(f"micro-batch size {self.micro_batch_size}: it must be at least 1")
        if self.prefetch < 1:
            raise UserError(f"prefetch of {self.prefetch} steps: it must be at least 1")
        warm_up = range(self.start_step, min(self.stop_step, schedule.warmup_steps))
        for step in (*warm_up, max(self.start_step, self.stop_step - 1)):
            if (size := schedule.batch_size(step)) % ranks:
                raise UserError(
                    f"the batch of step {step} holds {size} samples, which {ranks} ranks cannot share evenly: "
                    f"make the batch sizes and the warm-up's multiple ({schedule.multiple}) multiples of {ranks}"
                )

    def __iter__(self) -> Iterator[tuple[int, MicroBatches]]:
        """Yield (step, this rank's micro-batches): keyword arguments of model calls, on the CPU.

        An exception met while reading is raised here, at the step that it belongs to.
        """
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-loader")
        pending: deque[tuple[int, Future[MicroBatches]]] = deque()
        steps = iter(range(self.start_step, self.stop_step))
        try:
            while True:
                while len(pending) < self.prefetch and (step := next(steps, None)) is not None:
                    pending.append((step, reader.submit(self.micro_batches, step)))
                if not pending:
                    return
                step, batch = pending.popleft()
                yield step, batch.result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)

    def micro_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of one step; the last one may be smaller."""
        samples = self.mixture.global_batch(step)
        datasets = [component.dataset for component in self.mixture.components]
        share = len(samples) // self.world_size
        mine: Sequence[int] = range(self.rank * share, (self.rank + 1) * share)
        if self.row_work is not None and self.world_size > 1:
            work = [self.row_work(datasets[component].document_lengths(row)) for component, row in samples]
            mine = deal(work, self.world_size, self.micro_batch_size)[self.rank]
        blocks = [datasets[component][row] for component, row in map(samples.__getitem__, mine)]
        return [collate(blocks[i : i + self.micro_batch_size]) for i in range(0, share, self.micro_batch_size)]
