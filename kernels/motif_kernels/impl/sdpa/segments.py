"""Cutting attention into segments, so that nothing needs a large mask."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from motif_kernels.reference import attention_mask

# Queries in a segment that needs a mask of its own. Smaller blocks waste fewer masked products,
# larger ones fewer calls.
_QUERY_BLOCK = 128


class Segment(NamedTuple):
    """Queries [q_start, q_end) attend to keys [k_start, k_end).

    ``causal`` asks for torch's causal mask (as many queries as keys). Otherwise ``window`` is the
    inclusive (left, right) window, -1 for unbounded, with query ``q_start`` standing at key
    ``k_start + offset``.
    """

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    offset: int = 0

    def moved(self, queries: int, keys: int) -> "Segment":
        """The same so many queries and keys further on."""
        q_start, q_end, k_start, k_end = self[:4]
        return self._replace(
            q_start=q_start + queries, q_end=q_end + queries, k_start=k_start + keys, k_end=k_end + keys
        )

    def mask(self, like: Tensor) -> Tensor | None:
        """The additive mask (queries, keys), or None if nothing in the segment is masked."""
        if self.window == (-1, -1):
            return None
        queries, keys = self.q_end - self.q_start, self.k_end - self.k_start
        mask = attention_mask(queries, keys, window_size=self.window, offset=self.offset, device=like.device)
        return like.new_zeros(queries, keys).masked_fill_(~mask, -torch.inf)


def plan_segments(seqlen_q: int, seqlen_k: int, window_size: tuple[int, int]) -> list[Segment]:
    """Cuts a document into segments, in order; fully masked queries are in none."""
    if seqlen_q == 0 or seqlen_k == 0:
        return []
    offset = seqlen_k - seqlen_q  # query i stands at key i + offset
    left, right = window_size
    # Bounds that hide nothing are dropped: the first query sees the last key, the last query sees
    # the first key.
    if right >= seqlen_q - 1:
        right = -1
    if left >= seqlen_k - 1:
        left = -1
    if left < 0 and right < 0:
        return [Segment(0, seqlen_q, 0, seqlen_k)]
    if left < 0 and right == 0 and offset <= 0:
        # With more queries than keys, the first ones are fully masked.
        return [Segment(-offset, seqlen_q, 0, seqlen_k, causal=True)]
    return plan_blocks(seqlen_q, seqlen_k, window_size, _QUERY_BLOCK)


def plan_blocks(seqlen_q: int, seqlen_k: int, window_size: tuple[int, int], size: int) -> list[Segment]:
    """Segments of at most ``size`` queries, each with all keys that one of them sees; fully masked
    queries are in none.
    """
    if seqlen_k == 0:
        return []
    offset = seqlen_k - seqlen_q
    left, right = window_size
    segments = []
    for block in range(0, seqlen_q, size):
        start, end = block, min(block + size, seqlen_q)
        if right >= 0:
            start = max(start, -offset - right)  # the first query that sees the first key
        if left >= 0:
            end = min(end, seqlen_k - offset + left)  # one past the last query that sees the last key
        if start >= end:
            continue
        k_start = max(0, start + offset - left) if left >= 0 else 0
        k_end = min(seqlen_k, end + offset + right) if right >= 0 else seqlen_k
        hides_left = left >= 0 and k_start < end - 1 + offset - left
        hides_right = right >= 0 and start + offset + right < k_end - 1
        window = (left if hides_left else -1, right if hides_right else -1)
        segments.append(Segment(start, end, k_start, k_end, window=window, offset=start + offset - k_start))
    return segments


def plan_packed(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, plan: Callable[[int, int], list[Segment]]) -> list[Segment]:
    """The segments of all packed documents, of which ``plan`` cuts one of so many queries and keys.

    Reads the bounds: on a GPU that waits for it.
    """
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    segments = []
    for q0, q1, k0, k1 in zip(q_bounds, q_bounds[1:], k_bounds, k_bounds[1:], strict=False):
        segments += [s.moved(q0, k0) for s in plan(q1 - q0, k1 - k0)]
    return segments
