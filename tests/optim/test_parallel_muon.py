"""Parallel Muon on real processes: the numbers and the messages."""

import pytest
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from helpers.distributed import on_ranks
from helpers.muon_ranks import check_steps
from motifarch.optim.newton_schulz import newton_schulz_flops
from motifarch.optim.parallel_muon import plan_chunks
from motifarch.shards import held_ranges


@pytest.mark.parametrize(("ranks", "chunk_sizes"), [(2, [1, 1 << 20]), (4, [1, 1500])])
def test_same_steps_as_on_whole_matrices_and_each_moves_once_each_way(ranks: int, chunk_sizes: list[int]) -> None:
    on_ranks(ranks, check_steps, chunk_sizes)


def test_work_is_balanced_and_memory_bounded() -> None:
    shapes = [(4096, 4096)] * 13 + [(1024, 4096)] * 26 + [(4096, 16384)] * 20 + [(16384, 4096)] * 10 + [(64, 64)]
    for owners in (1, 3, 8, 100):
        chunks = plan_chunks(shapes, owners=owners, chunk_bytes=300 << 20, item_bytes=2)
        assert sorted(m for chunk in chunks for owned in chunk for m in owned) == list(range(len(shapes)))
        assert all(len(chunk) == owners for chunk in chunks)
        for chunk in chunks:
            for owned in chunk:
                assert sum(shapes[m][0] * shapes[m][1] * 2 for m in owned) <= 300 << 20
        work = [sum(newton_schulz_flops(*shapes[m]) for chunk in chunks for m in chunk[o]) for o in range(owners)]
        assert max(work) - min(work) <= newton_schulz_flops(4096, 16384)
    # One matrix that is larger than the bound is a chunk of its own.
    assert plan_chunks([(8, 8), (8, 8)], owners=1, chunk_bytes=1, item_bytes=4) == [[[0]], [[1]]]


def test_which_rows_a_rank_holds() -> None:
    assert [held_ranges((5, 3), (4,), (Shard(0),), (i,))[0] for i in range(4)] == [((0, 2),), ((2, 4),), ((4, 5),), ()]
    assert held_ranges((5, 3), (2, 2), (Replicate(), Shard(1)), (1, 1)) == (((0, 5),), ((2, 3),))
    # Three later parts of two rows, each halved: a rank of the first dimension alone has a row of
    # each.
    assert held_ranges((6, 1), (2,), (_StridedShard(0, split_factor=3),), (1,))[0] == ((1, 2), (3, 4), (5, 6))
    assert held_ranges((8, 1), (2, 2), (_StridedShard(0, split_factor=2), Shard(0)), (0, 1))[0] == ((4, 6),)
    with pytest.raises(ValueError, match="use Shard or Replicate"):
        held_ranges((4, 4), (2,), (Partial(),), (0,))
