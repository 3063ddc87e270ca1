import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.data import BatchSchedule
from motifarch.errors import UserError


@settings(deadline=None)
@given(multiple=st.integers(1, 8), start=st.integers(1, 20), growth=st.integers(0, 20), warmup_steps=st.integers(0, 60))
def test_prefix_sums_are_the_sums(multiple: int, start: int, growth: int, warmup_steps: int) -> None:
    schedule = BatchSchedule(
        (start + growth) * multiple, start=start * multiple, warmup_steps=warmup_steps, multiple=multiple
    )
    samples = step_sum = 0
    for step in range(100):
        assert schedule.samples_before(step) == samples
        assert schedule.prefix_sums(step) == (samples, step_sum)
        size = schedule.batch_size(step)
        assert size % multiple == 0
        samples, step_sum = samples + size, step_sum + step * size


def test_warm_up_is_linear_rounded_down() -> None:
    schedule = BatchSchedule(16, start=4, warmup_steps=6, multiple=4)
    assert [schedule.batch_size(step) for step in range(8)] == [4, 4, 8, 8, 12, 12, 16, 16]


def test_constant_without_warm_up() -> None:
    schedule = BatchSchedule(6)
    assert [schedule.batch_size(step) for step in (0, 1, 10**9)] == [6, 6, 6]
    assert schedule.samples_before(10**12) == 6 * 10**12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "batch size 0"),
        ({"size": 10, "multiple": 4}, "batch size 10 must be a positive multiple of 4: take 8"),
        ({"size": 8, "start": 3, "multiple": 4, "warmup_steps": 5}, "starting batch size 3"),
        ({"size": 8, "start": 16, "warmup_steps": 5}, "starting batch size 16 exceeds"),
        ({"size": 8, "warmup_steps": -1}, "-1 steps"),
        ({"size": 8, "multiple": 0}, "multiple=0"),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BatchSchedule(**arguments)
