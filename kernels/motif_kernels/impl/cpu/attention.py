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

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from motif_kernels.impl.sdpa.segments import Segment
from motif_kernels.reference import compute_dtype

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


def _stacked(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """X (B, S, heads R, W) as a copy (heads, B S R, W)."""
    x = x.unflatten(2, (heads, -1)).permute(2, 0, 1, 3, 4)
    return torch.empty(x.shape, dtype=dtype).copy_(x).flatten(1, 3)


def _unstacked(rows: Tensor, batch: int, group: int, dtype: torch.dtype) -> Tensor:
    """The opposite: (heads, B S R, W) as (B, S, heads R, W)."""
    heads, _, width = rows.shape
    rows = rows.view(heads, batch, -1, group, width).permute(1, 2, 0, 3, 4)
    return torch.empty(rows.shape, dtype=dtype).copy_(rows).flatten(2, 3)


class _Blocks:
    """The blocks of a call, and room for the largest one."""

    def __init__(self, blocks: Sequence[Segment], q: Tensor, heads: int, scale: float):
        self.blocks, self.heads, self.group, self.scale = blocks, heads, q.shape[2] // heads, scale
        self.dtype, self.product_dtype = compute_dtype(q), _product_dtype(q)
        self._masks: dict[tuple, tuple[int, Tensor]] = {}
        self._room: dict[str, Tensor] = {}
        self._largest = max(((b.q_end - b.q_start) * self.group * (b.k_end - b.k_start) for b in blocks), default=0)
        at_once = _CACHED_LOGITS * torch.get_num_threads() // max(1, self._largest)
        self.heads_at_once = max(1, min(heads, at_once))

    def __iter__(self) -> Iterator[tuple[Segment, slice, slice, slice]]:
        """Each block, its key heads, rows and keys."""
        for first in range(0, self.heads, self.heads_at_once):
            some = slice(first, min(first + self.heads_at_once, self.heads))
            for block in self.blocks:
                rows = slice(block.q_start * self.group, block.q_end * self.group)
                yield block, some, rows, slice(block.k_start, block.k_end)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The buffer of that name, made on first use."""
        if name not in self._room:
            self._room[name] = torch.empty(self.heads_at_once * self._largest, dtype=dtype)
        heads, rows, keys = shape
        return self._room[name][: heads * rows * keys].view(heads, rows, keys)

    def product(self, name: str, rows: Tensor, keys: Tensor, scale: float = 1.0) -> Tensor:
        """``scale * rows keys^T`` of (N, rows, W) and (N, keys, W) in the buffer of that name."""
        out = self._buffer(name, (*rows.shape[:2], keys.shape[1]), self.dtype)
        return torch.baddbmm(out, rows, keys.transpose(1, 2), beta=0, alpha=scale, out=out)

    def probabilities(self, block: Segment, q: Tensor, k: Tensor) -> Tensor:
        """The softmax of q (N, rows, D) and k (N, keys, D)."""
        logits = self.product("logits", q, k, self.scale)
        if block.window != (-1, -1):
            first, mask = self._mask(block)
            logits.unflatten(1, (-1, self.group))[..., first:].add_(mask)
        return torch.softmax(logits, -1, out=logits)

    def _mask(self, block: Segment) -> tuple[int, Tensor]:
        """The first key that a query of a block does not see, and what is added to the logits
        from there on.
        """
        kind = block.q_end - block.q_start, block.k_end - block.k_start, block.window, block.offset
        if kind not in self._masks:
            left, right = block.window
            first = max(0, block.offset + right + 1) if left < 0 else 0
            mask = block.mask(torch.empty(0, dtype=self.dtype))
            assert mask is not None
            self._masks[kind] = first, mask[:, None, first:]
        return self._masks[kind]

    def rounded(self, x: Tensor) -> Tensor:
        """P or dS as it is multiplied; valid until the next."""
        if self.product_dtype == self.dtype:
            return x
        return self._buffer("rounded", x.shape, self.product_dtype).copy_(x)


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
    q_, k_, v_ = (_stacked(t, heads, dtype) for t, dtype in ((q, work.dtype), (k, work.dtype), (v, work.product_dtype)))
    out = torch.zeros(*q_.shape[:2], v.shape[-1], dtype=work.product_dtype)
    for block, n, rows, keys in work:
        p = work.probabilities(block, q_[n, rows], k_[n, keys])
        out[n, rows] = torch.bmm(work.rounded(p), v_[n, keys])
    return _unstacked(out, len(q), work.group, q.dtype)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: Sequence[Segment], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    heads = k.shape[2]
    work = _Blocks(blocks, q, heads, scale)
    q_, k_, v_, grad_ = (_stacked(t, heads, work.dtype) for t in (q, k, v, grad))
    q_right, k_right, grad_right = (t.to(work.product_dtype) for t in (q_, k_, grad_))  # right sides of products
    dq = torch.zeros_like(q_right)
    dk, dv = torch.zeros_like(k_), torch.zeros_like(v_)
    for block, n, rows, keys in work:
        p = work.probabilities(block, q_[n, rows], k_[n, keys])
        dv[n, keys] += torch.bmm(work.rounded(p).transpose(1, 2), grad_right[n, rows])
        dp = work.product("dp", grad_[n, rows], v_[n, keys])
        ds = work.rounded(_softmax_backward(dp, p, -1, work.dtype, grad_input=dp).mul_(scale))
        dq[n, rows] = torch.bmm(ds, k_right[n, keys])
        dk[n, keys] += torch.bmm(ds.transpose(1, 2), q_right[n, rows])
    batch, dtype = len(q), q.dtype
    return _unstacked(dq, batch, work.group, dtype), _unstacked(dk, batch, 1, dtype), _unstacked(dv, batch, 1, dtype)
