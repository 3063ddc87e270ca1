"""The process group: gloo on CPUs, NCCL beside it on GPUs, and a world of one without torchrun."""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from motifarch.errors import UserError
from motifarch.parallel.rendezvous import fresh_store

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The ranks of this run and the device of this one."""

    rank: int
    """This process's number, from 0."""
    size: int
    """Number of processes."""
    device: torch.device
    """Where this process computes."""
    control: dist.ProcessGroup
    """A gloo group for small CPU messages: counts of targets, signals, decisions."""

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes the shared files."""
        return self.rank == 0

    def run_on_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """Gives every rank the (picklable) result of work that rank 0 alone does, or its UserError.

        Raises:
            UserError: on every rank, where the work raised one.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        if outcome[1] is not None:
            raise UserError(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def all_reduce_sum(self, numbers: Sequence[int]) -> list[int]:
        """Adds whole numbers up over all ranks, place by place, on the CPU."""
        total = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()  # type: ignore[no-any-return]


def launched_rank() -> int:
    """This process's rank from torchrun, 0 without it; known before any process group is."""
    return int(os.environ.get("RANK", "0"))


def launched_world_size() -> int:
    """The number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def collective_timeout(limit_s: float) -> datetime.timedelta:
    """A collective's timeout: longer than a step's limit, for the watchdog can say more."""
    return datetime.timedelta(seconds=1.5 * limit_s + 10)


@contextlib.contextmanager
def open_world(limit_s: float = 1800.0) -> Iterator[World]:
    """Joins the process group that torchrun prepared, or makes a world of one, and leaves it at the
    end; a rank may be waited for up to ``limit_s`` seconds.
    """
    timeout = collective_timeout(limit_s)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    where: dict[str, Any] = {}
    if "RANK" not in os.environ:
        where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        where = {"store": fresh_store(store, rank, size, timeout), "rank": rank, "world_size": size}
    dist.init_process_group(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timeout, **where)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo", timeout=timeout))
    except BaseException:
        # One failed rank among several can't leave in step with the others: it just exits.
        if dist.get_world_size() == 1:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
