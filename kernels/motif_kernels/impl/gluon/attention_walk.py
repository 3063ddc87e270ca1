"""The online softmax of a consumer: one head's attention for 64 queries, over tiles of keys in
shared memory.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from motif_kernels.impl.gluon.tiles import matrix
from motif_kernels.impl.triton.attention_tiles import LOG2_E, to_logits

ROWS = gl.constexpr(64)  # queries of a consumer
INFINITY = gl.constexpr(float("inf"))


@gluon.constexpr_function
def accumulator(width):
    """Of a warpgroup's product: its rows lie alike for every width."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, width, 16])


@gluon.jit
def _softmax(
    s,
    m,
    first,
    positions,
    bounds,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    MASKED: gl.constexpr,
):
    """A step of the online softmax: probabilities, new maxima, and the factor of what was before.

    Queries at ``positions`` among the keys see ``bounds``: how many keys there are, how many to the
    left, how many to the right.
    """
    # Where the scale is positive the largest product has the largest logit: scaling waits for the
    # exponent, one operation a logit.
    SCALED_LATER: gl.constexpr = SOFTCAP == 0 and SCALE > 0
    FACTOR: gl.constexpr = SCALE * LOG2_E if SCALED_LATER else 1.0
    if not SCALED_LATER:
        s = to_logits(s, SCALE, SOFTCAP)
    if MASKED:
        # Of a column's number a thread's place is bits 1 and 2, the same in all that it holds: what
        # is compared is then a constant with one number a row.
        column = gl.arange(0, s.shape[1], gl.SliceLayout(0, s.type.layout))[None, :]
        place, constant = column & 6, column & ~6
        length, left, right = bounds
        last = gl.full_like(positions, 0) + (length - 1)
        if HAS_RIGHT:
            last = gl.minimum(last, positions + right)
        seen = constant <= (last - first)[:, None] - place
        if HAS_LEFT:
            seen = seen & (constant >= (positions - (left + first))[:, None] - place)
        s = gl.where(seen, s, -INFINITY)
    m_new = gl.maximum(m, gl.max(s, 1) * FACTOR)
    m_finite = m_new
    if MASKED:  # a row that is fully masked so far
        m_finite = gl.where(m_new == -INFINITY, 0.0, m_new)
    return gl.exp2(s * FACTOR - m_finite[:, None]), m_new, gl.exp2(m - m_finite)


@gluon.jit
def attend(
    q,
    k_tiles,
    v_tiles,
    ready,
    empty,
    turns,
    step,
    keys,
    positions,
    bounds,
    PART: gl.constexpr,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One head's attention for a consumer's queries: output (ROWS, DV) before the division, row
    maxima and row sums. ``step`` counts the tiles of keys since the program began.
    """
    KEYS: gl.constexpr = k_tiles.shape[2]
    DV: gl.constexpr = v_tiles.shape[4]
    logits: gl.constexpr = accumulator(KEYS)
    outputs: gl.constexpr = accumulator(DV)
    operand: gl.constexpr = gl.DotOperandLayout(0, outputs, k_width=2)
    begin, middle, middle_end, end = keys
    nothing = gl.zeros([ROWS, KEYS], gl.float32, logits)
    o = gl.zeros([ROWS, DV], gl.float32, outputs)
    m = gl.full([ROWS], -INFINITY, gl.float32, gl.SliceLayout(1, logits))

    stage = step % STAGES
    mbarrier.wait(ready.index(stage), step // STAGES & 1)
    mbarrier.wait(turns.index(PART), (step & 1) ^ (1 - PART))
    s = warpgroup_mma(q, matrix(k_tiles.index(stage)).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(turns.index(1 - PART), count=1)
    s = warpgroup_mma_wait(0, deps=[s])
    p, m, alpha = _softmax(s, m, begin, positions, bounds, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, True)
    l = gl.sum(p, 1)  # noqa: E741
    for part in gl.static_range(3):  # cut by the mask on the left, whole, cut on the right
        if HAS_LEFT or part > 0:
            start = begin if part == 0 else middle if part == 1 else middle_end
            stop = middle if part == 0 else middle_end if part == 1 else end
            for first in range(gl.maximum(start, begin + KEYS), stop, KEYS):
                before = step % STAGES
                step += 1
                stage = step % STAGES
                # Rounded here and not where they were made: carried round the loop, halves of
                # registers would be taken apart and put together again.
                rounded = gl.convert_layout(p.to(v_tiles.dtype), operand)
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                mbarrier.wait(turns.index(PART), (step & 1) ^ (1 - PART))
                s = warpgroup_mma(
                    q, matrix(k_tiles.index(stage)).permute((1, 0)), nothing, use_acc=False, is_async=True
                )
                o = warpgroup_mma(rounded, matrix(v_tiles.index(before)), o, is_async=True)
                mbarrier.arrive(turns.index(1 - PART), count=1)
                s = warpgroup_mma_wait(1, deps=[s])
                p, m, alpha = _softmax(s, m, first, positions, bounds, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, part != 1)
                l = l * alpha + gl.sum(p, 1)  # noqa: E741
                # Passed long ago: a loop that ptxas moves no wait across. It would put the next one
                # before the softmax, which is to run under the product.
                mbarrier.wait(ready.index(stage), step // STAGES & 1)
                o = warpgroup_mma_wait(0, deps=[o])
                mbarrier.arrive(empty.index(before), count=1)
                o *= gl.convert_layout(alpha, gl.SliceLayout(1, outputs))[:, None]
    stage = step % STAGES
    o = warpgroup_mma(gl.convert_layout(p.to(v_tiles.dtype), operand), matrix(v_tiles.index(stage)), o)
    mbarrier.arrive(empty.index(stage), count=1)
    return o, m, l, step + 1
