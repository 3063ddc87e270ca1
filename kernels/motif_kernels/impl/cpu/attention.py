"""Softmax attention on the CPU, a block of queries at a time, forward and backward.

The query heads that share a key head are stacked as rows: a block of queries by all keys that it
sees is one matrix product for the whole group, and its softmax is exact, without running maxima.
Keys that no query of a block sees are in no product. Arithmetic is in float32 (float64). The
backward pass computes the probabilities again, so that nothing but the inputs is saved:

    P = softmax(scale Q K^T),    dV = P^T dO,    dS = P (dO V^T - rowsum(P dO V^T)),
    dQ = scale dS K,    dK = scale dS^T Q

In bfloat16, on a processor that multiplies it, the products whose left side is P or dS take both
sides in bfloat16, as torch's own attention does; logits and dO V^T stay in float32, and so do all
sums.

Shapes: N key heads, T tokens of all sequences, R query heads of a key head, W a width; rows are
(token, query head).
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from motif_kernels.impl.sdpa.segments import Segment
from motif_kernels.reference import attention_mask, compute_dtype

# Queries of a block: enough for matrix products to run at full speed, few enough that causal blocks
# waste little. Measured with 1 and 4 query heads a key head, at 512 and 2,048 tokens.
_QUERIES = 64
# Logits of a block: for each thread those that its cache holds, of several key heads; of one, what
# keeps a long sequence's block at 16 MiB.
_CACHED_LOGITS = 1 << 18
_MOST_LOGITS = 1 << 22

_softmax_backward = torch.ops.aten._softmax_backward_data.out


def block_queries(group: int, seqlen_k: int) -> int:
    """Queries of a block whose keys may be so many, with R query heads a key head."""
    return max(1, min(_QUERIES, _MOST_LOGITS // max(1, group * seqlen_k)))


@cache
def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16; without, they are slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _product_dtype(x: Tensor) -> torch.dtype:
    """What P and dS are rounded to before they are multiplied."""
    return x.dtype if x.dtype == torch.bfloat16 and _multiplies_bfloat16() else compute_dtype(x)


def _heads_first(x: Tensor, dtype: torch.dtype) -> Tensor:
    """X (B, S, N, W) as a copy (N, B S, W)."""
    return x.flatten(0, 1).transpose(0, 1).to(dtype, memory_format=torch.contiguous_format)


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """Adds ``scale * left right`` to a total, which may be wider than they are."""
    if total.dtype == left.dtype:
        total.baddbmm_(left, right, alpha=scale)
    else:
        total.add_(torch.bmm(left, right), alpha=scale)


class _Blocks:
    """The blocks of a call, and room for the largest one."""

    def __init__(self, blocks: Sequence[Segment], q: Tensor, heads: int, scale: float):
        self.heads, self.group, self.scale, self.tokens = heads, q.shape[2] // heads, scale, q.shape[:2].numel()
        # The largest first, so that its buffers serve all.
        self.blocks = sorted(blocks, key=self._logits, reverse=True)
        self.dtype, self.product_dtype = compute_dtype(q), _product_dtype(q)
        self._masks: dict[tuple, Tensor] = {}
        self._room: dict[str, Tensor] = {}
        largest = self._logits(self.blocks[0]) if self.blocks else 0
        self.heads_at_once = max(1, min(heads, _CACHED_LOGITS * torch.get_num_threads() // max(1, largest)))

    def __iter__(self) -> Iterator[tuple[Segment, slice, slice]]:
        """Each block, its key heads and keys."""
        for first in range(0, self.heads, self.heads_at_once):
            some = slice(first, min(first + self.heads_at_once, self.heads))
            for block in self.blocks:
                yield block, some, slice(block.k_start, block.k_end)

    def _logits(self, block: Segment) -> int:
        return (block.q_end - block.q_start) * self.group * (block.k_end - block.k_start)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer of that name, made when the present one is too small."""
        size = math.prod(shape)
        if name not in self._room or len(self._room[name]) < size:
            self._room[name] = torch.empty(size, dtype=dtype)
        return self._room[name][:size].view(shape)

    def room_for(self, q: Tensor, width: int) -> Tensor:
        """What blocks write for the queries q: (B, S, H, W), 0 for those in no block."""
        covered = sum(block.q_end - block.q_start for block in self.blocks) == self.tokens
        return (torch.empty if covered else torch.zeros)(*q.shape[:3], width, dtype=q.dtype)

    def _view(self, x: Tensor, block: Segment, some: slice) -> Tensor:
        """The block's queries of x (B, S, H, W), as (N, queries, R, W)."""
        return x.flatten(0, 1)[block.q_start : block.q_end].unflatten(1, (self.heads, -1))[:, some].transpose(0, 1)

    def read(self, name: str, x: Tensor, block: Segment, some: slice) -> Tensor:
        """The block's rows (N, rows, W) of x (B, S, H, W), a copy in the buffer of that name."""
        view = self._view(x, block, some)
        return self._buffer(name, view.shape, self.dtype).copy_(view).flatten(1, 2)

    def write(self, x: Tensor, block: Segment, some: slice, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """Puts the rows ``scale * left right`` into x (B, S, H, W)."""
        out = self._buffer("written", (*left.shape[:2], right.shape[2]), left.dtype)
        torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)
        self._view(x, block, some).copy_(out.unflatten(1, (-1, self.group)))

    def product(self, name: str, rows: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """``scale * rows keys^T`` of (N, rows, W) and (N, keys, W) in the buffer of that name."""
        out = self._buffer(name, (*rows.shape[:2], keys.shape[1]), self.dtype)
        return torch.baddbmm(out, rows, keys.transpose(1, 2), beta=0, alpha=scale, out=out)

    def probabilities(self, block: Segment, q: Tensor, k: Tensor) -> Tensor:
        """The softmax of q (N, rows, D) and k (N, keys, D)."""
        logits = self.product("logits", q, k, self.scale)
        if block.window != (-1, -1):
            # Not added: a hidden key may be NaN.
            first, hidden = self._hidden(block)
            logits.unflatten(1, (-1, self.group))[..., first:].masked_fill_(hidden, -math.inf)
        return torch.softmax(logits, -1, out=logits)

    def _hidden(self, block: Segment) -> tuple[int, Tensor]:
        """The first key that a query of a block does not see, and which each (queries, 1, keys)
        does not see from there on.
        """
        left, right = block.window
        first = max(0, block.offset + right + 1) if left < 0 else 0
        kind = block.q_end - block.q_start, block.k_end - block.k_start - first, block.window, block.offset - first
        if kind not in self._masks:
            queries, keys, window, offset = kind
            self._masks[kind] = ~attention_mask(queries, keys, window_size=window, offset=offset)[:, None]
        return first, self._masks[kind]

    def rounded(self, name: str, x: Tensor) -> Tensor:
        """X as it is multiplied, in the buffer of that name if that is another dtype."""
        if self.product_dtype == self.dtype:
            return x
        return self._buffer(name, x.shape, self.product_dtype).copy_(x)


def forward(q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Segment], scale: float) -> Tensor:
    """The output (B, Sq, H, Dv) of q (B, Sq, H, D), k (B, Sk, N, D) and v (B, Sk, N, Dv).

    Args:
        q: queries, H a multiple of N.
        k: keys.
        v: values.
        blocks: in tokens of the whole batch, one row after the other.
        scale: multiplies the logits.
    """
    heads = k.shape[2]
    work = _Blocks(blocks, q, heads, scale)
    k_, v_ = _heads_first(k, work.dtype), _heads_first(v, work.product_dtype)
    out = work.room_for(q, v.shape[-1])
    for block, n, keys in work:
        p = work.probabilities(block, work.read("q", q, block, n), k_[n, keys])
        work.write(out, block, n, work.rounded("p", p), v_[n, keys])
    return out


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    heads = k.shape[2]
    work = _Blocks(blocks, q, heads, scale)
    k_, v_ = _heads_first(k, work.dtype), _heads_first(v, work.dtype)
    k_right = k_.to(work.product_dtype)  # the right side of a product
    dq, dk, dv = work.room_for(q, q.shape[-1]), torch.zeros_like(k_), torch.zeros_like(v_)
    for block, n, keys in work:
        q_, grad_ = work.read("q", q, block, n), work.read("grad", grad, block, n)
        p = work.probabilities(block, q_, k_[n, keys])
        _add_product(dv[n, keys], work.rounded("p", p).transpose(1, 2), work.rounded("right", grad_))
        dp = work.product("dp", grad_, v_[n, keys])
        ds = work.rounded("p", _softmax_backward(dp, p, -1, work.dtype, grad_input=dp))
        work.write(dq, block, n, ds, k_right[n, keys], scale)
        _add_product(dk[n, keys], ds.transpose(1, 2), work.rounded("right", q_), scale)
    dk, dv = (
        torch.empty(t.shape, dtype=q.dtype).copy_(x.transpose(0, 1).unflatten(0, t.shape[:2]))
        for t, x in ((k, dk), (v, dv))
    )
    return dq, dk, dv
