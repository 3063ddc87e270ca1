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


@pytest.mark.parametrize("target", [-0.7, 0.02, 1.3])
def test_no_other_edit_is_smaller(target):
    q, k, *_ = vectors(3, size=4, dtype=torch.float64)

    def cost(other):  # of moving q there, and k along it as far as it then has to
        return ((other - q) ** 2).sum() + (target - other @ k) ** 2 / (other @ other)

    best = math.inf
    for start in range(5):
        other = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(start)).requires_grad_()
        search = torch.optim.LBFGS([other], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def evaluate(search=search, other=other):
            search.zero_grad()
            value = cost(other)
            value.backward()
            return value

        search.step(evaluate)
        best = min(best, float(cost(other.detach())))
    new_q, new_k = with_dot(q, k, target)
    assert float(((new_q - q) ** 2).sum() + ((new_k - k) ** 2).sum()) == pytest.approx(best, rel=1e-6)


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


def test_bfloat16_keeps_the_product_far_better_than_plain_rounding():
    plain, ours = [], []
    for seed in range(20):
        pair = vectors(seed, size=128, dtype=torch.bfloat16)[:2]
        q, k = with_dot(*(v.double() for v in pair), 0.4)
        plain.append(abs(dot(q.bfloat16(), k.bfloat16()) - 0.4))
        ours.append(abs(dot(*with_dot(*pair, 0.4)) - 0.4))
    assert max(ours) < 1e-6
    assert max(plain) > 1e-4
