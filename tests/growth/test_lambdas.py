"""Lambda's vectors: the product wanted, the nearest edit, rounding that keeps it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from motifarch.growth.lambdas import shift_lambda, with_dot


def dot(q, k):
    return float(q.double() @ k.double())


def vectors(seed, size=16, scale=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=generator)).to(dtype) for _ in range(4)]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.sampled_from([1e-3, 0.1, 1.0]),
    zero=st.sampled_from([(), (0,), (1,), (0, 1)]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    target=st.floats(-3.0, 3.0),
)
def test_the_product_is_the_one_wanted(seed, scale, zero, dtype, target):
    pair = [v * 0 if i in zero else v for i, v in enumerate(vectors(seed, 128, scale, dtype)[:2])]
    q, k = with_dot(*pair, target)
    assert q.dtype == k.dtype == dtype
    # Of the vectors' lengths; plain rounding to bfloat16 is off by some 2e-4 of them.
    part = 1e-9 if dtype in (torch.float64, torch.float32) else 2e-6
    assert dot(q, k) == pytest.approx(target, abs=1e-8 + part * float(q.double().norm() * k.double().norm()))


@pytest.mark.parametrize("q", [torch.full((8,), 0.3), torch.zeros(8)], ids=["opposite", "zero"])
def test_vectors_that_have_only_one_direction_still_move(q):
    k = -q
    for target in (-1.0, 0.5):
        assert dot(*with_dot(q, k, target)) == pytest.approx(target, abs=1e-7)


@pytest.mark.parametrize(("shift", "kept"), [(-0.3, (0, 1)), (0.5, (0, 1)), (1.4, (2, 3))])
def test_the_second_product_moves_where_it_can_and_else_the_first(shift, kept):
    before = vectors(5)
    after = shift_lambda(*before, shift)

    def value(q1, k1, q2, k2):
        return math.exp(dot(q1, k1)) - math.exp(dot(q2, k2))

    assert value(*after) - value(*before) == pytest.approx(shift, abs=1e-6)
    assert [i for i in range(4) if torch.equal(before[i], after[i])] == list(kept)
