"""The backends of a CPU: no map of Sq x Sk in memory, one noise map a group."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.memory import largest_allocation
from motif_kernels import diff_attn_func, diff_attn_varlen_func, flops, reference
from motif_kernels.impl.sdpa.segments import plan_blocks, plan_segments

LENGTH = 2048


def test_the_meter_sees_an_attention_map():
    """The measure itself: the reference holds maps of float32."""
    q = torch.randn(1, LENGTH, 1, 8)
    assert largest_allocation(lambda: diff_attn_func(q, q, q, q, q, 0.5, backend="reference")) >= 4 * LENGTH**2


@pytest.mark.parametrize("case", ["causal", "window", "wide window", "packed", "packed window", "short queries"])
@pytest.mark.parametrize(("backend", "dv"), [("sdpa", 16), ("sdpa", 32), ("cpu", 32)])
def test_nothing_of_map_size_is_allocated(case, backend, dv):
    length = 2 * LENGTH if backend == "cpu" else LENGTH  # a block of 64 queries by all keys must be small beside it
    sq = length // 2 if case == "short queries" else length
    q1, q2 = (torch.randn(1, sq, h, 16, requires_grad=True) for h in (4, 1))
    k1, k2 = (torch.randn(1, length, 1, 16, requires_grad=True) for _ in range(2))
    v = torch.randn(1, length, 1, dv, requires_grad=True)
    window = {"window": (100, 0), "wide window": (length // 2, 0), "packed window": (100, 0)}.get(case, (-1, -1))
    bounds = torch.tensor([0, length - 100, length], dtype=torch.int32)

    def step():
        if case.startswith("packed"):
            args = [t[0] for t in (q1, k1, q2, k2, v)]
            out = diff_attn_varlen_func(
                *args, 0.5, bounds, bounds, length, length, causal=True, window_size=window, backend=backend
            )
        else:
            out = diff_attn_func(q1, k1, q2, k2, v, 0.5, causal=True, window_size=window, backend=backend)
        out.sum().backward()

    # One byte for each pair would already be a boolean mask.
    assert largest_allocation(step) < sq * length


@pytest.mark.parametrize("backend", ["sdpa", "cpu"])
def test_noise_map_is_computed_once_a_group(backend):
    """Counted by the FLOPs of attention: those of 8 signal and of 2 noise heads."""
    q1, q2, k = torch.randn(1, 8, 8, 4), torch.randn(1, 8, 2, 4), torch.randn(1, 8, 2, 4)
    with FlopCounterMode(display=False) as counter:
        diff_attn_func(q1, k, q2, k, k, 0.5, causal=True, backend=backend)
    assert counter.get_total_flops() == flops.attention_flops(36, 8 + 2, 4, 4)


@pytest.mark.parametrize("sq", [0, 1, 5, 127, 128, 129, 300])
@pytest.mark.parametrize("sk", [0, 1, 5, 128, 300])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, 2), (-1, 4), (4, -1), (200, 0), (150, 170)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("plan", [plan_segments, partial(plan_blocks, size=48)])
def test_segments_cover_exactly_the_mask(sq, sk, window, causal, plan):
    covered = torch.zeros(sq, sk, dtype=torch.int64)
    for s in plan(sq, sk, (window[0], 0) if causal else window):
        queries, keys = s.q_end - s.q_start, s.k_end - s.k_start
        mask = s.mask(torch.empty(0))
        seen = torch.ones(queries, keys, dtype=torch.bool) if mask is None else mask == 0
        if s.causal:
            assert queries == keys
            seen = seen.tril()
        assert seen.any(dim=1).all()  # no row of a segment is fully masked: torch would give NaN
        covered[s.q_start : s.q_end, s.k_start : s.k_end] += seen
    visible = reference.attention_mask(sq, sk, causal=causal, window_size=window)
    assert torch.equal(covered, visible.long())


@pytest.mark.parametrize("packed", [True, False])
def test_operator_contract(packed):
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32) if packed else None
    q, k, v = (torch.randn(1, 9, 2, w, requires_grad=True) for w in (4, 4, 8))
    for operator in (torch.ops.motif.segmented_attention, torch.ops.motif.blocked_attention):
        torch.library.opcheck(operator.default, (q, k, v, bounds, bounds, 0.5, 3, 0))
