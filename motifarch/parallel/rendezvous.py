"""A store that holds nothing of an earlier start.

torchrun keeps one store for all its restarts, where process groups find the addresses that killed
processes left (pytorch/pytorch issue 135712). Nodes count their own restarts only, which name no
start: so rank 0 draws a name for each, and gives it to whoever asks in this one.
"""

import datetime
import time
import uuid

import torch.distributed as dist


def fresh_store(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> dist.Store:
    """A part of a store, agreed on by all ranks of this start, that no earlier start has used.

    Raises:
        RuntimeError: some rank did not come in time (`DistStoreError`, and on rank 0 one that names
            the missing).
    """
    name = uuid.uuid4().hex
    if rank == 0:
        _welcome(store, size, name, timeout)
    else:
        # `name` is a question here, which nobody has asked before; its answer can't be an old one.
        store.set(f"start/asked/{rank}", name)
        store.wait([f"start/answer/{name}"], timeout)
        name = store.get(f"start/answer/{name}").decode()
        store.set(f"start/{name}/here/{rank}", "")
    return dist.PrefixStore(f"start/{name}", store)


def _welcome(store: dist.Store, size: int, name: str, timeout: datetime.timedelta) -> None:
    """Answers until every rank has confirmed; a question may be an earlier start's."""
    answered: dict[int, bytes] = {}
    missing = list(range(1, size))
    until = time.monotonic() + timeout.total_seconds()
    while missing:
        for rank in missing:
            if store.check([f"start/asked/{rank}"]):
                question = store.get(f"start/asked/{rank}")
                if answered.get(rank) != question:
                    answered[rank] = question
                    store.set(f"start/answer/{question.decode()}", name)
        missing = [rank for rank in missing if not store.check([f"start/{name}/here/{rank}"])]
        if missing and time.monotonic() > until:
            raise RuntimeError(f"timed out waiting for rank(s) {', '.join(map(str, missing[:16]))} to start")
        time.sleep(0.01)
