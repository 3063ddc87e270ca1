"""Which tokens of a padded batch are real, and document bounds from positions."""

import itertools

import pytest
import torch

from helpers.agreement import assert_agrees
from motifarch.layers import PaddingMask, SoftmaxAttention, cu_seqlens_from_position_ids


def test_mask_is_packed_to_the_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
    packed = PaddingMask(mask, num_queries=4).pack(4)
    assert packed.query_index.tolist() == packed.key_index.tolist() == [2, 3, 4, 5, 6, 7, 12, 13]
    assert packed.cu_seqlens_q.tolist() == packed.cu_seqlens_k.tolist() == [0, 2, 6, 6, 8]
    assert packed.cu_seqlens_q.dtype == torch.int32
    assert (packed.max_seqlen_q, packed.max_seqlen_k) == (4, 4)


def test_new_tokens_are_the_last_columns_and_a_short_cache_the_last_keys():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    padding = PaddingMask(mask, num_queries=1)
    whole, short = padding.pack(5), padding.pack(3)
    assert whole.query_index.tolist() == short.query_index.tolist() == [0, 1]
    assert whole.cu_seqlens_k.tolist() == [0, 3, 8]
    assert short.cu_seqlens_k.tolist() == [0, 3, 6]
    assert short.key_index.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("positions", "bounds"),
    [
        ([0, 1, 2, 0, 1], [0, 3, 5]),
        ([0, 0, 0], [0, 1, 2, 3]),
        ([5, 6, 0, 1, 2], [0, 2, 5]),  # a document cut by a block border goes on where it was
        ([0, 1, 2], [0, 3]),
    ],
)
def test_documents_start_where_positions_restart(positions, bounds):
    cu_seqlens, longest = cu_seqlens_from_position_ids(torch.tensor([positions]))
    assert cu_seqlens.tolist() == bounds
    assert cu_seqlens.dtype == torch.int32
    assert longest == max(b - a for a, b in itertools.pairwise(bounds))


def test_every_row_starts_a_document():
    rows = torch.tensor([[0, 1, 0, 1], [2, 3, 4, 5], [6, 7, 0, 1]])
    cu_seqlens, longest = cu_seqlens_from_position_ids(rows)
    assert cu_seqlens.tolist() == [0, 2, 4, 8, 10, 12]
    assert longest == 4


@pytest.mark.parametrize("kind", [torch.bool, torch.long])
def test_a_plain_mask_is_padding(kind):
    layer = SoftmaxAttention(32, num_heads=4, num_kv_heads=2, head_dim=8)
    x = torch.randn(2, 5, 32)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=kind)
    together = layer(x, padding=mask)
    assert_agrees(together, layer(x, padding=PaddingMask(mask, num_queries=5)), 1e-7)
    assert_agrees(together[0, 2:], layer(x[:1, 2:])[0])
    assert_agrees(together[1], layer(x[1:])[0])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 4), "padding is of torch.float32.*attn_mask"),
        (torch.ones(1, 5, dtype=torch.bool), r"padding has shape \(1, 5\).*1 rows, 4 tokens"),
        (torch.ones(2, 4, dtype=torch.bool), r"padding has shape \(2, 4\)"),
        (torch.ones(1, 4, 4, dtype=torch.bool), "each token sees is attn_mask"),
    ],
    ids=["floats", "longer", "more rows", "a map"],
)
def test_other_masks_are_no_padding(mask, message):
    layer = SoftmaxAttention(32, num_heads=4)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(1, 4, 32), padding=mask)
