"""A store shared by several starts: each has a part of its own, the same on all ranks."""

import datetime
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from motifarch.parallel.rendezvous import fresh_store

RANKS = 3


def connect(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


def start(server: dist.TCPStore, ranks: int = RANKS, seconds: float = 30) -> list[dist.Store]:
    """One start: all ranks at once, each with a connection of its own."""
    timeout = datetime.timedelta(seconds=seconds)
    with ThreadPoolExecutor(RANKS) as pool:
        coming = [pool.submit(fresh_store, connect(server), rank, RANKS, timeout) for rank in range(ranks)]
        return [future.result() for future in coming]


def test_starts_do_not_see_one_another(server: dist.TCPStore) -> None:
    for number in range(3):
        stores = start(server)
        assert not any(store.check(["address"]) for store in stores)
        stores[number].set("address", str(number))
        assert [store.get("address") for store in stores] == [str(number).encode()] * RANKS


def test_a_question_left_by_a_dead_rank_is_not_taken_for_an_arrival(server: dist.TCPStore) -> None:
    # Rank 2 died right after it had asked; nobody was there to answer.
    connect(server).set("start/asked/2", "0123")
    stores = start(server)
    stores[0].set("address", "new")
    assert stores[2].get("address") == b"new"


def test_the_missing_rank_is_named(server: dist.TCPStore) -> None:
    with pytest.raises(RuntimeError, match=r"timed out waiting for rank\(s\) 2 to start"):
        start(server, ranks=2, seconds=0.5)
