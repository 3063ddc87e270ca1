import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.data import BatchSchedule, Block, Mixture, MixtureComponent
from motifarch.errors import UserError


class Rows:
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Block:
        return Block(np.array([index, 0], dtype=np.int32), np.array([2], dtype=np.int32))


def make(sizes: list[int], weights: list[float], ends: list[float] | None = None, **options: object) -> Mixture:
    components = [
        MixtureComponent(Rows(size), weight, None if ends is None else ends[i])
        for i, (size, weight) in enumerate(zip(sizes, weights, strict=True))
    ]
    options = {"seed": 0, "batch_schedule": BatchSchedule(8), **options}
    return Mixture(components, **options)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_counts_stay_within_one_sample_of_the_weights_integral(data: st.DataObject) -> None:
    number = data.draw(st.integers(1, 7))
    weight = st.one_of(st.just(0.0), st.floats(1e-3, 1.0))
    weights = data.draw(st.lists(weight, min_size=number, max_size=number).filter(any))
    ends = data.draw(st.lists(weight, min_size=number, max_size=number).filter(any))
    ramp_start = data.draw(st.integers(0, 40))
    ramp_end = ramp_start + data.draw(st.integers(1, 60))
    start, growth = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 12))
    schedule = BatchSchedule(start + growth, start=start, warmup_steps=data.draw(st.integers(0, 50)))
    mixture = make([11] * number, weights, ends, batch_schedule=schedule, ramp_start=ramp_start, ramp_end=ramp_end)
    begin, end = np.array(weights) / sum(weights), np.array(ends) / sum(ends)
    drawn, integral = np.zeros(number), np.zeros(number)
    for step in range(150):
        batch = mixture.global_batch(step)
        assert len(batch) == schedule.batch_size(step)
        progress = np.clip((step - ramp_start) / (ramp_end - ramp_start), 0, 1)
        integral += len(batch) * (begin + (end - begin) * progress)
        drawn += np.bincount([component for component, _ in batch], minlength=number)
        assert np.abs(drawn - integral).max() < 1 + 1e-6
    assert mixture.epochs(150) == pytest.approx(drawn / 11)


def test_random_access_agrees_with_sequential() -> None:
    def mixture() -> Mixture:
        schedule = BatchSchedule(12, start=4, warmup_steps=20, multiple=2)
        return make([50, 31, 7], [5, 3, 1], [1, 1, 4], batch_schedule=schedule, ramp_start=10, ramp_end=60)

    sequential = mixture()
    batches = [sequential.global_batch(step) for step in range(100)]
    visited = mixture()
    for step in (57, 3, 99, 0, 98, 98, 12):
        assert visited.global_batch(step) == batches[step]
    assert mixture().global_batch(73) == batches[73]


@pytest.mark.parametrize(("sizes", "weights"), [([37], [1.0]), ([37, 5, 100], [0.5, 0.2, 0.3])])
def test_no_row_repeats_within_an_epoch_and_epochs_differ(sizes: list[int], weights: list[float]) -> None:
    mixture = make(sizes, weights)
    rows: dict[int, list[int]] = {component: [] for component in range(len(sizes))}
    for step in range(60):
        # A batch that crosses from one epoch to the next is shuffled, so epochs are told apart by
        # counting.
        for component, row in mixture.global_batch(step):
            rows[component].append(row)
    for component, size in enumerate(sizes):
        times = Counter(rows[component])
        assert max(times.values()) - min(times.get(row, 0) for row in range(size)) <= 1
    orders = [mixture._rows(0, epoch * 37, (epoch + 1) * 37) for epoch in range(3)]
    assert all(sorted(order) == list(range(37)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


def test_seeds_differ() -> None:
    first, second = (make([1000], [1.0], seed=seed) for seed in (0, 1))
    assert first.global_batch(0) != second.global_batch(0)


def test_batches_mix_their_components() -> None:
    mixture = make([1000, 1000], [0.5, 0.5], batch_schedule=BatchSchedule(64))
    halves = [Counter(component for component, _ in mixture.global_batch(step)[:32]) for step in range(20)]
    assert all(4 < counts[0] < 28 for counts in halves)
    assert len({counts[0] for counts in halves}) > 1


def test_weights_move_linearly() -> None:
    mixture = make([10, 10], [3, 1], [1, 1], ramp_start=10, ramp_end=20)
    assert [mixture.weights(step)[0] for step in (0, 10, 15, 20, 99)] == pytest.approx([0.75, 0.75, 0.625, 0.5, 0.5])


def test_a_late_step_of_a_huge_dataset_needs_little() -> None:
    mixture = make([10**13], [1.0], batch_schedule=BatchSchedule(4096))
    batch = mixture.global_batch(10**9)
    assert len({row for _, row in batch}) == 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [], "weights": []}, "no dataset"),
        ({"sizes": [5, 0]}, "dataset 1 of the mixture has no rows"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"weights": [1, -1]}, "0 or more"),
        ({"weights": [1, float("nan")]}, "finite"),
        ({"ends": [1, 2]}, "set ramp_end"),
        ({"ramp_start": 5, "ramp_end": 4}, "from step 5 to step 4"),
    ],
)
def test_bad_mixtures_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"sizes": [5, 5], "weights": [1, 1], **change}
    with pytest.raises(UserError, match=message):
        make(**arguments)  # type: ignore[arg-type]


def schedule(size: int) -> BatchSchedule:
    return BatchSchedule(size, start=size // 2, warmup_steps=20)


@pytest.mark.parametrize(("sizes", "weights"), [([500], [1.0]), ([400, 300, 50], [5.0, 3.0, 0.4])])
@pytest.mark.parametrize("size", [4, 8, 24])
def test_other_batches_go_on_with_the_next_samples(sizes: list[int], weights: list[float], size: int) -> None:
    before = make(sizes, weights, batch_schedule=schedule(8))
    place = json.loads(json.dumps(before.place(15)))
    after = make(sizes, weights, batch_schedule=schedule(size))
    assert after.go_on(15, place) == (size != 8)
    steps = range(15, 20)
    drawn = [sample for step in range(15) for sample in before.global_batch(step)]
    drawn += [sample for step in steps for sample in after.global_batch(step)]
    assert len(drawn) == len(set(drawn))  # within the first epoch: none twice
    assert [len(after.global_batch(step)) for step in steps] == [schedule(size).batch_size(step) for step in steps]
    # And none left out: the order of the rows is that of one run.
    first = {row for component, row in drawn if component == 0}
    assert first == {row for _, row in make(sizes[:1], [1.0], batch_schedule=BatchSchedule(len(first))).global_batch(0)}


def test_going_on_again_is_as_if_never_interrupted() -> None:
    def changed() -> Mixture:
        return make([50, 31, 7], [5, 3, 1], [1, 1, 4], batch_schedule=schedule(12), ramp_start=10, ramp_end=60)

    first = make([50, 31, 7], [5, 3, 1], batch_schedule=schedule(8))
    whole = changed()
    assert whole.go_on(25, first.place(25))
    for step in (26, 40, 90):
        resumed = changed()
        assert not resumed.go_on(step, whole.place(step))
        assert [resumed.global_batch(s) for s in range(step, 99)] == [whole.global_batch(s) for s in range(step, 99)]
        assert resumed.epochs(99) == whole.epochs(99)
