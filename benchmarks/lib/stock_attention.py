"""FlashAttention-2's forward pass as a Triton user would write it, to hold the static model to.

What was published for such kernels on an H100 is what :mod:`benchmarks.lib.predict` must give for
this one. It is compiled and never launched. (batch, heads, tokens, width), contiguous.

Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 1.
"""

import triton
import triton.language as tl


@triton.jit
def _attention_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    out_pointer,
    lse_pointer,
    tokens,
    SCALE: tl.constexpr,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64) * tokens * D
    first = tl.program_id(0) * BLOCK_M
    queries, columns = first + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q = tl.load(q_pointer + head + queries[:, None] * D + columns[None, :])
    o = tl.zeros([BLOCK_M, D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    for part in tl.static_range(2 if CAUSAL else 1):  # whole tiles, then those that the diagonal cuts
        start = first if part == 1 else 0
        stop = first + BLOCK_M if part == 1 else first if CAUSAL else tokens
        for at in tl.range(start, stop, BLOCK_N):
            keys = at + tl.arange(0, BLOCK_N)
            k = tl.load(k_pointer + head + keys[None, :] * D + columns[:, None])
            s = tl.dot(q, k)
            if part == 1:
                s = tl.where(queries[:, None] >= keys[None, :], s, -1.0e6)
            m_new = tl.maximum(m, tl.max(s, axis=1) * SCALE)
            p = tl.exp2(s * SCALE - m_new[:, None])
            alpha = tl.exp2(m - m_new)
            l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
            v = tl.load(v_pointer + head + keys[:, None] * D + columns[None, :])
            o = tl.dot(p.to(v.dtype), v, o * alpha[:, None])
            m = m_new
    tl.store(lse_pointer + tl.program_id(1) * tokens + queries, m + tl.log2(l))
    out = o / l[:, None]
    tl.store(out_pointer + head + queries[:, None] * D + columns[None, :], out.to(out_pointer.dtype.element_ty))
