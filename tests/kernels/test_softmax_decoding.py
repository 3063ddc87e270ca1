"""The baseline's attention to a cache: row by row where lengths may be read, else under a mask."""

from __future__ import annotations

import pytest
import torch

from motif_kernels import softmax
from motif_kernels.softmax import softmax_attn_func, softmax_attn_with_kvcache

LENGTHS = [23, 3, 40]


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize("is_paged", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (9, 0), (4, 2)])
@pytest.mark.parametrize("leftpad", [(0, 0, 0), (3, 3, 8)])
@pytest.mark.parametrize("new", [1, 4])
def test_last_tokens_of_each_row(new, leftpad, window, is_paged, readable, monkeypatch):
    """One row holds fewer tokens than are asked for, and one nothing but padding."""
    if not readable:
        monkeypatch.setattr(softmax, "may_read", lambda values: False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, n, h, 8, generator=generator) for n, h in ((new, 4), (48, 2), (48, 2)))
    lengths, padding = (torch.tensor(t, dtype=torch.int32) for t in (LENGTHS, leftpad))
    caches, table = (k, v), None
    if is_paged:
        table = torch.randperm(18, generator=generator).view(3, 6).int()
        caches = tuple(
            torch.zeros(18, 8, 2, 8).index_copy(0, table.flatten().long(), t.view(18, 8, 2, 8)) for t in (k, v)
        )
    out = softmax_attn_with_kvcache(
        q, *caches, lengths, cache_leftpad=padding, block_table=table, causal=window[1] <= 0, window_size=window
    )
    for b, (end, begin) in enumerate(zip(LENGTHS, leftpad, strict=True)):
        held = [t[b : b + 1, begin:end] for t in (k, v)]
        options = {"causal": window[1] <= 0, "window_size": window, "backend": "reference"}
        expected = softmax_attn_func(q[b : b + 1], *held, **options)
        torch.testing.assert_close(out[b : b + 1], expected, atol=2e-6, rtol=1e-5)


def test_refuses_with_a_reason():
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 16, 2, 8)
    with pytest.raises(ValueError, match="cache_seqlens holds 17, but a row's cache has room for 16"):
        softmax_attn_with_kvcache(q, k, k, torch.tensor([3, 17], dtype=torch.int32))
    with pytest.raises(ValueError, match="backend 'triton' is not one of"):
        softmax_attn_with_kvcache(q, k, k, torch.tensor([3, 16], dtype=torch.int32), backend="triton")
