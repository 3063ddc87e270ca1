"""Padded batches: which tokens are real, and how to pack them."""

from typing import NamedTuple

import torch
from torch import Tensor


class PackedTokens(NamedTuple):
    """Where a padded batch's real tokens lie, and their bounds once packed."""

    query_index: Tensor  # (total_q,) into B * Sq
    key_index: Tensor  # (total_k,) into B * Sk
    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor  # (B + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


class PaddingMask:
    """A (B, S) mask over all keys, cached ones included; the queries are its last columns.

    A row's real tokens are taken for neighbours, whatever lies between them, and its real queries
    for the last of them: so it is with padding on the left, and without a cache with padding on
    either side.

    Layers take a plain mask as well; one object serves all layers of a call, and is packed once.

    Args:
        mask: (B, S), nonzero for a real token.
        num_queries: sq, the tokens that are new in this call.
        queries: (B, sq) bool, which queries are real, where they are not the last columns: those of
            cross-attention.
    """

    def __init__(self, mask: Tensor, num_queries: int, *, queries: Tensor | None = None) -> None:
        self.mask = mask.bool()
        self.queries = self.mask[:, -num_queries:] if queries is None else queries
        self._packed: dict[int, PackedTokens] = {}

    def pack(self, num_keys: int) -> PackedTokens:
        """Bounds and indices for the last ``num_keys`` columns, such as a window's."""
        if num_keys not in self._packed:
            keys = self.mask[:, -num_keys:]
            (query_index, cu_q, max_q), (key_index, cu_k, max_k) = _pack(self.queries), _pack(keys)
            self._packed[num_keys] = PackedTokens(query_index, key_index, cu_q, cu_k, max_q, max_k)
        return self._packed[num_keys]


def _pack(mask: Tensor) -> tuple[Tensor, Tensor, int]:
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return mask.flatten().nonzero().flatten(), cu_seqlens, int(lengths.max())


def read_padding(
    padding: Tensor | PaddingMask, rows: int, num_queries: int, num_keys: int | None, *, of_context: bool
) -> PaddingMask:
    """What a call says of padding.

    Args:
        padding: (B, keys), true for a real token; or that as a PaddingMask.
        rows: B.
        num_queries: tokens that are new in the call.
        num_keys: keys of the call; None where a cache may hold others than the mask speaks of.
        of_context: whether the mask is that of a context, whose queries are all real.

    Raises:
        ValueError: a mask of another shape, or of floats.
    """
    mask = padding.mask if isinstance(padding, PaddingMask) else padding
    if mask.is_floating_point():
        raise ValueError(
            f"padding is of {mask.dtype}; give bool, True for a real token. A mask that is added to the logits is "
            "attn_mask"
        )
    if mask.ndim != 2 or mask.shape[0] != rows or num_keys not in (None, mask.shape[1]):
        raise ValueError(
            f"padding has shape {tuple(mask.shape)}; it must be ({rows} rows, {num_keys or 'all'} tokens that are "
            "keys). A mask that says what each token sees is attn_mask"
        )
    if of_context:
        return PaddingMask(mask, num_queries, queries=mask.new_ones(mask.shape[0], num_queries, dtype=torch.bool))
    return padding if isinstance(padding, PaddingMask) else PaddingMask(mask, num_queries)


def cu_seqlens_from_position_ids(position_ids: Tensor) -> tuple[Tensor, int]:
    """Document bounds of packed rows, from position ids that restart at each document.

    Args:
        position_ids: (B, S).

    Returns:
        int32 bounds (documents + 1,) in the B * S tokens, and the longest document's length.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids.diff() != 1
    bounds = torch.cat([starts.flatten().nonzero().flatten(), position_ids.new_tensor([position_ids.numel()])]).int()
    return bounds, int(bounds.diff().max())
