"""Schedules against their closed forms."""

import math

import pytest

from motifarch.optim import build_schedule


def test_wsd_linear() -> None:
    factor = build_schedule("wsd", total_steps=100, warmup_steps=10, decay_steps=20, min_ratio=0.1)
    assert [factor(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert [factor(s) for s in range(10, 80)] == [1.0] * 70
    assert [factor(s) for s in range(80, 100)] == pytest.approx([1 - 0.9 * k / 20 for k in range(1, 21)])


@pytest.mark.parametrize(
    ("shape", "middle"),
    [
        ("linear", 0.625),
        ("cosine", 0.625),
        # 1 / sqrt(1 + 15/2), with 15 = 4^2 - 1.
        ("inverse_sqrt", 1 / math.sqrt(8.5)),
    ],
)
def test_wsd_shapes_meet_their_ends(shape: str, middle: float) -> None:
    factor = build_schedule(
        "wsd",
        total_steps=100,
        decay_steps=40,
        decay_shape=shape,  # type: ignore[arg-type]
        min_ratio=0.25,
    )
    assert factor(59) == 1.0
    assert factor(79) == pytest.approx(middle)
    assert factor(99) == pytest.approx(0.25)
    # A resumed run may look past the end: it stays there.
    assert factor(150) == pytest.approx(0.25)
    falling = [factor(s) for s in range(59, 100)]
    assert falling == sorted(falling, reverse=True)


def test_inverse_sqrt_is_a_power_law() -> None:
    factor = build_schedule("wsd", total_steps=10, decay_steps=10, decay_shape="inverse_sqrt", min_ratio=0.5)
    slopes = [factor(s + 1) ** -2 - factor(s) ** -2 for s in range(9)]
    assert slopes == pytest.approx([0.3] * 9)


def test_inverse_sqrt_never_reaches_zero() -> None:
    factor = build_schedule("wsd", total_steps=10, decay_steps=10, decay_shape="inverse_sqrt", min_ratio=0.0)
    with pytest.raises(ValueError, match="min_ratio above 0"):
        factor(5)


def test_cosine() -> None:
    factor = build_schedule("cosine", total_steps=110, warmup_steps=10, min_ratio=0.2)
    assert [factor(s) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    for s in (10, 35, 59, 84, 109):
        t = (s - 9) / 100
        assert factor(s) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi * t)) / 2)
    assert factor(109) == pytest.approx(0.2)


def test_constant_and_no_warmup() -> None:
    factor = build_schedule("constant", total_steps=5, warmup_steps=2)
    assert [factor(s) for s in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert build_schedule("wsd", total_steps=5)(0) == 1.0
    with pytest.raises(ValueError, match="unknown schedule"):
        build_schedule("linear", total_steps=5)  # type: ignore[arg-type]
