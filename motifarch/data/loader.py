"""One rank's micro-batches, read ahead in a background thread."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from motifarch.data.collation import collate
from motifarch.data.mixture import Mixture
from motifarch.errors import UserError

MicroBatches = list[dict[str, Any]]


class BatchLoader:
    """Iterates over the steps of a run, giving one rank its part of each global batch.

    The ranks' rows, put together in rank order, are the mixture's global batch: what a step sees
    does not depend on the number of ranks, nor on the step at which a run was resumed. Reading is
    done by a thread, not by processes: rows are slices of memory-mapped files, so there is nothing
    to gain from more.

    Args:
        mixture: the sampler; its components' datasets are read here.
        rank: this rank's number among those that see different data.
        world_size: how many such ranks there are.
        micro_batch_size: most rows in one model call.
        start_step: the first step to give.
        stop_step: the step to stop before.
        prefetch: steps read ahead.

    Raises:
        UserError: if a batch size of the steps asked for does not divide by ``world_size``.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int,
        start_step: int,
        stop_step: int,
        prefetch: int = 2,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size} ranks: it must lie between 0 and {world_size - 1}")
        if micro_batch_size < 1:
            raise UserError(f"micro-batch size {micro_batch_size}: it must be at least 1")
        if prefetch < 1:
            raise UserError(f"prefetch of {prefetch} steps: it must be at least 1")
        schedule = mixture.batch_schedule
        warm_up = range(start_step, min(stop_step, schedule.warmup_steps))
        for step in (*warm_up, max(start_step, stop_step - 1)):
            if (size := schedule.batch_size(step)) % world_size:
                raise UserError(
                    f"the batch of step {step} holds {size} samples, which {world_size} ranks cannot share evenly: "
                    f"make the batch sizes and the warm-up's multiple ({schedule.multiple}) multiples of {world_size}"
                )
        self.mixture = mixture
        self.rank = rank
        self.world_size = world_size
        self.micro_batch_size = micro_batch_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.prefetch = prefetch

    def __iter__(self) -> Iterator[tuple[int, MicroBatches]]:
        """Yield (step, this rank's micro-batches), each the keyword arguments of one model call, on
        the CPU.

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
        share = len(samples) // self.world_size
        mine = samples[self.rank * share : (self.rank + 1) * share]
        blocks = [self.mixture.components[component].dataset[row] for component, row in mine]
        return [collate(blocks[i : i + self.micro_batch_size]) for i in range(0, share, self.micro_batch_size)]
