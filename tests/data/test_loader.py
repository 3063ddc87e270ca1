import threading

import numpy as np
import pytest
import torch

from motifarch.data import AttentionWork, BatchLoader, BatchSchedule, Block, Mixture, MixtureComponent
from motifarch.errors import UserError

SEQ_LEN = 4


class Rows:
    """Row i holds token i in its first place; reading a row in ``broken`` fails."""

    def __init__(self, size: int, first: int = 0, broken: frozenset[int] = frozenset()) -> None:
        self.size, self.first, self.broken = size, first, broken

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Block:
        if index in self.broken:
            raise UserError(f"row {index} is broken")
        tokens = np.full(SEQ_LEN + 1, self.first + index, dtype=np.int32)
        return Block(tokens, self.document_lengths(index))

    def document_lengths(self, index: int) -> np.ndarray:
        """One document, or two."""
        lengths = [SEQ_LEN + 1] if index % 3 else [2, SEQ_LEN - 1]
        return np.array(lengths, dtype=np.int32)


def make_mixture(**options: int) -> Mixture:
    components = [MixtureComponent(Rows(40), 2.0), MixtureComponent(Rows(9, first=100), 1.0)]
    return Mixture(components, seed=3, batch_schedule=BatchSchedule(8, **{"multiple": 4, **options}))


def load(
    world_size: int = 1,
    rank: int = 0,
    start: int = 0,
    stop: int = 10,
    micro: int = 2,
    work: AttentionWork | None = None,
    **options: int,
) -> dict:
    place = {"rank": rank, "world_size": world_size, "micro_batch_size": micro, "row_work": work}
    return dict(BatchLoader(make_mixture(**options), **place, start_step=start, stop_step=stop))


def rows_of(micro_batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return torch.cat([batch["input_ids"].view(-1, SEQ_LEN)[:, 0] for batch in micro_batches]).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_see_the_global_batch(world_size: int) -> None:
    ranks = [load(world_size, rank, start=0, stop=10) for rank in range(world_size)]
    mixture = make_mixture()
    for step in range(10):
        expected = [row + 100 * component for component, row in mixture.global_batch(step)]
        assert [row for rank in ranks for row in rows_of(rank[step])] == expected


FULL = AttentionWork([(-1, -1)])


@pytest.mark.parametrize(("world_size", "micro"), [(2, 1), (2, 3), (4, 2)])
def test_balanced_ranks_see_the_same_rows(world_size: int, micro: int) -> None:
    ranks = [load(world_size, rank, micro=micro, work=FULL) for rank in range(world_size)]
    mixture = make_mixture()
    for step in range(10):
        expected = [row + 100 * component for component, row in mixture.global_batch(step)]
        assert sorted(row for rank in ranks for row in rows_of(rank[step])) == sorted(expected)
        sizes = [[batch["input_ids"].shape[1] for batch in rank[step]] for rank in ranks]
        assert sizes == [[b["input_ids"].shape[1] for b in load(world_size, micro=micro, stop=1)[0]]] * world_size
    # Single rows: in every step, no more than one micro-batch has rows of both kinds.
    if micro == 1:
        halves = [[len(batch["cu_seq_lens_q"]) for step in range(10) for batch in rank[step]] for rank in ranks]
        assert sum(a != b for a, b in zip(*halves, strict=True)) <= 10


@pytest.mark.parametrize("work", [None, FULL])
def test_resumed_loader_gives_exactly_the_same(work: AttentionWork | None) -> None:
    from_start, resumed = load(2, 1, stop=20, work=work), load(2, 1, start=11, stop=20, work=work)
    assert list(resumed) == list(range(11, 20))
    for step, batches in resumed.items():
        for ours, theirs in zip(batches, from_start[step], strict=True):
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name]))


def test_micro_batches_hold_at_most_their_size() -> None:
    sizes = [batch["input_ids"].shape[1] // SEQ_LEN for batch in load(micro=3)[0]]
    assert sizes == [3, 3, 2]


def test_a_failing_read_is_raised_at_its_step_and_the_thread_ends() -> None:
    mixture = Mixture([MixtureComponent(Rows(64, broken=frozenset({17})))], seed=0, batch_schedule=BatchSchedule(8))
    broken = next(step for step in range(8) if (0, 17) in mixture.global_batch(step))
    batches = iter(BatchLoader(mixture, rank=0, world_size=1, micro_batch_size=8, start_step=0, stop_step=8))
    assert [next(batches)[0] for _ in range(broken)] == list(range(broken))
    with pytest.raises(UserError, match="row 17 is broken"):
        next(batches)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


def test_the_thread_ends_when_the_consumer_stops_early() -> None:
    iterator = iter(
        BatchLoader(make_mixture(), rank=0, world_size=1, micro_batch_size=2, start_step=0, stop_step=10**6)
    )
    assert [next(iterator)[0] for _ in range(3)] == [0, 1, 2]
    assert [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]
    iterator.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


def test_reads_ahead_no_further_than_asked() -> None:
    read: list[int] = []

    class Watched(BatchLoader):
        def micro_batches(self, step: int) -> list:
            read.append(step)
            return super().micro_batches(step)

    loader = Watched(make_mixture(), rank=0, world_size=1, micro_batch_size=2, start_step=0, stop_step=99, prefetch=3)
    iterator = iter(loader)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert max(read) <= 3


def test_empty_range_of_steps() -> None:
    assert load(start=5, stop=5) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 3, "rank": 0}, "8 samples, which 3 ranks cannot share"),
        ({"world_size": 2, "rank": 2}, "rank 2 of 2"),
        ({"micro_batch_size": 0}, "micro-batch size 0"),
        ({"prefetch": 0}, "prefetch of 0"),
    ],
)
def test_impossible_layouts_are_refused(change: dict[str, int], message: str) -> None:
    arguments = {"rank": 0, "world_size": 1, "micro_batch_size": 2, "start_step": 0, "stop_step": 5, **change}
    with pytest.raises(UserError, match=message):
        BatchLoader(make_mixture(), **arguments)


def test_warm_up_sizes_must_divide_too() -> None:
    mixture = make_mixture(start=4, warmup_steps=8, multiple=1)
    layout = {"rank": 0, "world_size": 2, "micro_batch_size": 2, "stop_step": 20}
    with pytest.raises(UserError, match="the batch of step 2 holds 5 samples, which 2 ranks"):
        BatchLoader(mixture, start_step=0, **layout)
    BatchLoader(mixture, start_step=8, **layout)  # past the warm-up, all batches divide
