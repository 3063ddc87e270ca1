import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.data.permutation import Permutation


@settings(deadline=None, max_examples=200)
@given(size=st.integers(1, 5000), key=st.integers(0, 2**64))
def test_is_a_bijection(size: int, key: int) -> None:
    images = Permutation(size, key)(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 18), 4**5 - 1, 4**5, 4**5 + 1])
def test_is_a_bijection_at_and_beside_powers(size: int) -> None:
    assert sorted(Permutation(size, "key")(np.arange(size)).tolist()) == list(range(size))


def test_one_index_and_many_agree() -> None:
    permutation = Permutation(1000, 7, "epoch", 3)
    together = permutation(np.arange(1000))
    assert together[[0, 17, 999]].tolist() == [int(permutation(np.array(i))) for i in (0, 17, 999)]


def test_sizes_beyond_memory() -> None:
    size = 10**15
    images = Permutation(size, 0)(np.arange(size - 1000, size))
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < size


def test_every_part_of_the_key_matters() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0), (10, 0), (0, "0"), (0, "order")]
    orders = {tuple(Permutation(100, *key)(np.arange(100)).tolist()) for key in keys}
    assert len(orders) == len(keys)


def test_order_is_fixed_for_good() -> None:
    # A run resumed with another version of anything must see the same samples.
    assert Permutation(10, 0, "epoch", 1)(np.arange(10)).tolist() == [7, 2, 9, 0, 5, 4, 3, 6, 8, 1]


@pytest.mark.parametrize("size", [3, 8, 97])
def test_elements_visit_all_positions_evenly(size: int) -> None:
    keys = 4000
    first = np.array([int(Permutation(size, key)(np.array(0))) for key in range(keys)])
    counts = np.bincount(first, minlength=size)
    expected = keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < (size - 1) + 6 * np.sqrt(2 * (size - 1))  # six standard deviations


def test_neighbours_are_unrelated() -> None:
    images = Permutation(10_000, 5)(np.arange(10_000)).astype(float)
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match="range"):
        Permutation(10, 0)(np.array([0, position]))


def test_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Permutation(0)
