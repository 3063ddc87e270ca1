"""Which tokens of a padded batch are real, and document bounds from positions."""

import itertools

import pytest
import torch

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


def test_a_plain_mask_is_no_padding():
    layer = SoftmaxAttention(32, num_heads=4, num_kv_heads=2, head_dim=8, layer_idx=0)
    x, mask = torch.zeros(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="give PaddingMask"):
        layer(x, None, padding=mask)
