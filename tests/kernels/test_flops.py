"""Flop formulas: against the mask itself, against hand counts, and through torch's counter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from motif_kernels import diff_attn_func, diff_attn_varlen_func, flops, reference

BOUNDS = st.integers(-1, 12)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.tuples(BOUNDS, BOUNDS))
def test_visible_pairs_are_those_of_the_mask(queries, keys, causal, window):
    mask = reference.attention_mask(queries, keys, causal=causal, window_size=window)
    assert flops.visible_pairs(queries, keys, causal, window) == mask.sum().item()


def test_visible_pairs_add_up_over_documents():
    queries, keys = [3, 0, 5, 1], [4, 2, 0, 1]
    cu_q, cu_k = (torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int() for lengths in (queries, keys))
    mask = reference.packed_attention_mask(cu_q, cu_k, 9, 7, causal=True, window_size=(1, -1))
    assert flops.visible_pairs(queries, keys, True, (1, -1)) == mask.sum().item() > 0
    assert flops.visible_pairs(2**20, 2**20, True) == 2**19 * (2**20 + 1)  # no loop over tokens


def test_visible_pairs_refuses_documents_that_do_not_match():
    with pytest.raises(ValueError, match="2 documents and seqlens_k 1"):
        flops.visible_pairs([1, 2], [3])


@pytest.mark.parametrize(
    ("signal", "noise", "dv", "forward", "backward"),
    [(1, 1, 2, 12, 20), (4, 1, 2, 30, 62), (8, 2, 2, 60, 124), (1, 1, 1, 8, 16), (2, 1, 2, 18, 34)],
)
def test_differential_counts_in_units_of_the_head_width(signal, noise, dv, forward, backward):
    head_dim = 64
    assert flops.diff_attention_flops(7, signal, noise, head_dim, dv * head_dim) == 7 * forward * head_dim
    assert flops.diff_attention_backward_flops(7, signal, noise, head_dim, dv * head_dim) == 7 * backward * head_dim


def tensors(leading_q, leading_k, head_dim, value_dim, signal=4, noise=2, key_heads=2, dtype=torch.float32):
    def randn(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return (
        randn(*leading_q, signal, head_dim),
        randn(*leading_k, key_heads, head_dim),
        randn(*leading_q, noise, head_dim),
        randn(*leading_k, key_heads, head_dim),
        randn(*leading_k, key_heads, value_dim),
        0.5,
    )


def counted(function, *args, **options):
    """Operations of the forward, and of the backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = function(*args, backend="sdpa", **options)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


# Two calls of an attention library share nothing: the composed backend's mathematics is Hs + Hn
# ordinary maps.
HEADS = 6


@pytest.mark.parametrize(
    ("sq", "sk", "d", "dv", "mask", "pairs"),
    [
        (5, 5, 16, 16, {"causal": True}, 15),
        (5, 7, 16, 16, {}, 35),
        # Each query sees itself and at most two before it.
        (6, 6, 8, 16, {"causal": True, "window_size": (2, -1)}, 1 + 2 + 3 + 3 + 3 + 3),
    ],
)
def test_dense(sq, sk, d, dv, mask, pairs):
    measured = counted(diff_attn_func, *tensors((2, sq), (2, sk), d, dv), **mask)
    assert measured == (2 * pairs * HEADS * (2 * d + 2 * dv), 2 * pairs * HEADS * (6 * d + 4 * dv))


def test_dense_attention_with_wider_values_counts_what_torch_is_given():
    """The sdpa backend pads the narrower side before it calls torch: that operator sees D = Dv."""
    measured = counted(diff_attn_func, *tensors((2, 5), (2, 5), 8, 16), causal=True)
    assert measured == (2 * 15 * HEADS * 4 * 16, 2 * 15 * HEADS * 10 * 16)


def test_packed_documents():
    d, dv = 8, 16
    cu_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    pairs = (1 + 2 + 3) + 0 + (3 + 4)  # the last document's two queries stand at keys 2 and 3
    args = (*tensors((5,), (8,), d, dv), cu_q, cu_k, 3, 4)
    measured = counted(diff_attn_varlen_func, *args, causal=True)
    assert measured == (pairs * HEADS * (2 * d + 2 * dv), pairs * HEADS * (6 * d + 4 * dv))


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 3), (4, 4)])
def test_torchs_own_causal_mask_is_aligned_to_the_top_left(queries, keys):
    heads, d = 3, 16
    q, k, v = (torch.randn(2, heads, n, d, requires_grad=True) for n in (queries, keys, keys))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
    pairs = 2 * torch.ones(queries, keys).tril().sum().item()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    assert counts[aten._scaled_dot_product_flash_attention_for_cpu] == pairs * heads * 4 * d
    assert counts[aten._scaled_dot_product_flash_attention_for_cpu_backward] == pairs * heads * 10 * d
