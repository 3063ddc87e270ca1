"""Windows over ranks that hold parts of a row: a halo of keys in the place of the whole row."""

import pytest

from helpers.distributed import on_ranks
from helpers.halo_ranks import compare, count
from motifarch.layers.halo import halo_length


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_are_equal_to_one_process(ranks: int) -> None:
    on_ranks(ranks, compare)


def test_messages_are_the_windows_keys_however_long_the_row() -> None:
    on_ranks(3, count, 6)


def test_a_halo_is_no_longer_than_what_there_is() -> None:
    assert [halo_length(8, 11, rank) for rank in range(3)] == [0, 8, 11]
