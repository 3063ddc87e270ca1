"""Differential attention, forward: one kernel from queries, keys and values to the finished output.

A program serves a tile of queries of one noise head. It first attends with the noise head and lays
the result aside in float32; then it attends with each signal head of the group in turn, takes the
difference in float32, applies the sub-norm or the gate, and rounds once. The noise product is
computed once a group; no map and no repeated head is ever in memory. The noise tile lies in a
scratch array that only its program reads, soon after and so from the GPU's cache: held in registers
beside the signal's accumulator, it would halve the tile that a program can serve.

Softmax attention is the same kernel without a noise map, each head a group of its own.

Keys are walked through tile by tile with the online softmax. Only tiles that the mask cuts do the
work of masking: the walk goes over a masked range, an unmasked one and a masked one.

For the backward pass it leaves the rounded difference A (where an epilogue follows), the rounded
noise output O2, the log-sum-exp of each map, and the sub-norm's inverse root mean square. Arrays of
one number a token are (heads, tokens).
"""

import triton
import triton.language as tl

from motif_kernels.impl.triton.attention_tiles import (
    LOG2_E,
    NUMBERS,
    described_rows,
    document,
    document_tile,
    inner_products,
    key_ranges,
    load_parts,
    load_rows,
    load_tile,
    pieces,
    product,
    rows_of,
    store_rows,
    store_tile,
    to_logits,
    visible,
)


@triton.jit
def _walk(
    o,
    m,
    l,  # noqa: E741
    q,
    queries,
    k_source,
    v_source,
    start,
    stop,
    shift,
    seqlen_k,
    left,
    right,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """The online softmax over keys [start, stop): updates the output o, the row maxima m and the
    row sums l.
    """
    # Scaled in the exponent, products need no multiplication of their own before.
    IN_EXPONENT: tl.constexpr = SOFTCAP == 0 and SCALE > 0
    SLOPE: tl.constexpr = SCALE * LOG2_E if IN_EXPONENT else 1.0
    for first in tl.range(start, stop, BLOCK_N):
        k = load_parts(k_source, first, seqlen_k, BLOCK_N, D, BLOCK_D, MASKED, DESCRIBED)
        s = inner_products(q, k)
        if not IN_EXPONENT:
            s = to_logits(s, SCALE, SOFTCAP)
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            seen = visible(queries[:, None], keys[None, :], shift, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT)
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) * SLOPE)
        m_finite = m_new
        if MASKED:  # a row that is fully masked so far
            m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * SLOPE - m_finite[:, None])
        alpha = tl.exp2(m - m_finite)
        l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
        v = load_rows(v_source, first, seqlen_k, BLOCK_N, DV, BLOCK_DV, MASKED, DESCRIBED)
        o = product(p.to(v.dtype), v, o * alpha[:, None])
        m = m_new
    return o, m, l


@triton.jit
def _attend(
    q_source,
    k_source,
    v_source,
    first_query,
    seqlen_q,
    seqlen_k,
    shift,
    begin,
    middle,
    middle_end,
    end,
    left,
    right,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One head's attention for a tile of queries: output (BLOCK_M, BLOCK_DV), log-sum-exp and
    largest logit.
    """
    q = load_parts(q_source, first_query, seqlen_q, BLOCK_M, D, BLOCK_D, True, DESCRIBED)
    queries = first_query + tl.arange(0, BLOCK_M)
    o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    for part in tl.static_range(3):  # cut by the mask on the left, whole, cut on the right
        if HAS_LEFT or part > 0:
            start = begin if part == 0 else middle if part == 1 else middle_end
            stop = middle if part == 0 else middle_end if part == 1 else end
            o, m, l = _walk(  # noqa: E741
                o, m, l, q, queries, k_source, v_source, start, stop, shift, seqlen_k, left, right,
                SCALE, SOFTCAP, part != 1, HAS_LEFT, HAS_RIGHT, DESCRIBED, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    fully_masked = l == 0
    o = o * tl.where(fully_masked, 0.0, 1 / l)[:, None]
    # Infinite in a fully masked row: every probability that the backward pass recomputes is then 0.
    lse = tl.where(fully_masked, float("inf"), m + tl.log2(l))
    return o, lse, m


@triton.jit
def _finish(
    parts,
    lam,
    noise_pointer,
    noise_stride,
    out_target,
    difference_target,
    weight_pointer,
    gate_pointer,
    gate_at,
    gate_stride,
    inverse_rms_pointer,
    inverse_rms_at,
    first,
    length_q,
    scaled,
    out_scale,
    NORM_EPS: tl.constexpr,
    HAS_DIFFERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECES: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """A signal head's difference from its output, in pieces (BLOCK_M, WIDTH); the epilogue, and the
    one rounding.
    """
    squares = tl.zeros([BLOCK_M], tl.float32)
    differences = ()
    for c in tl.static_range(PIECES):
        a = parts[c]
        if noise_pointer is not None:
            at = noise_pointer + c * WIDTH
            noise = load_tile(at, noise_stride, first, length_q, BLOCK_M, DV - c * WIDTH, WIDTH, True)
            a -= lam[:, None] * noise
        if HAS_DIFFERENCE:
            store_rows(difference_target, first, length_q, c * WIDTH, a, BLOCK_M, DV, WIDTH, DESCRIBED)
        squares += tl.sum(a * a, axis=1)
        differences = differences + (a,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no stars
    scale = tl.full([BLOCK_M], 1.0, tl.float32) * out_scale
    if weight_pointer is not None:
        inverse_rms = tl.rsqrt(squares / DV + NORM_EPS)
        scale *= inverse_rms
        if inverse_rms_pointer is not None:
            queries = first + tl.arange(0, BLOCK_M)
            tl.store(inverse_rms_pointer + inverse_rms_at + queries, inverse_rms, mask=queries < length_q)
    for c in tl.static_range(PIECES):
        a = differences[c] * scale[:, None]
        if weight_pointer is not None:
            columns = c * WIDTH + tl.arange(0, WIDTH)
            weight = tl.load(weight_pointer + columns, mask=columns < DV, other=0.0).to(tl.float32)
            a *= weight[None, :]
        if gate_pointer is not None:
            at = gate_pointer + gate_at + c * WIDTH
            gate = load_tile(at, gate_stride, first, scaled, BLOCK_M, DV - c * WIDTH, WIDTH, True)
            a *= tl.sigmoid(gate.to(tl.float32))
        store_rows(out_target, first, length_q, c * WIDTH, a, BLOCK_M, DV, WIDTH, DESCRIBED)


@triton.jit(do_not_specialize=NUMBERS)
def _forward_kernel(
    q1,  # a descriptor, or a pointer with the strides below
    k1,
    q2,
    k2,
    v,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    out,  # likewise, of contiguous tensors, as difference and o2
    difference,
    o2,
    scratch_pointer,
    lse1_pointer,
    lse2_pointer,
    inverse_rms_pointer,
    max1_pointer,
    max2_pointer,
    q1_batch,
    q1_token,
    q1_head,
    k1_batch,
    k1_token,
    k1_head,
    q2_batch,
    q2_token,
    q2_head,
    k2_batch,
    k2_token,
    k2_head,
    v_batch,
    v_token,
    v_head,
    lam_batch,
    lam_token,
    lam_head,
    gate_batch,
    gate_token,
    gate_head,
    seqlen_q,
    seqlen_k,
    tokens,
    key_tokens,
    documents,
    left,
    right,
    noise_heads,
    out_scale,
    NORM_EPS: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
    SIGNALS_PER_K1: tl.constexpr,
    NOISES_PER_K2: tl.constexpr,
    NOISES_PER_V: tl.constexpr,
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    # The last queries see most under a causal mask: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    n = tl.program_id(1)
    z, first = tl.program_id(2), block * BLOCK_M
    tile = z.to(tl.int64) * tl.num_programs(0) + block
    if cu_seqlens_q_pointer is not None:
        z, first = document_tile(block, cu_seqlens_q_pointer, documents, tokens, BLOCK_M)
    q_start, token_start, length_q = document(z, cu_seqlens_q_pointer, seqlen_q, tokens, documents, tokens)
    k_start, _, length_k = document(z, cu_seqlens_k_pointer, seqlen_k, key_tokens, documents, 0)
    if (first < 0) | (first >= length_q):
        if max1_pointer is not None:
            if HAS_NOISE:
                tl.store(max2_pointer + tile * noise_heads + n, float("-inf"))
            for i in tl.range(GROUP):
                tl.store(max1_pointer + tile * (noise_heads * GROUP) + n * GROUP + i, float("-inf"))
        return
    queries = first + tl.arange(0, BLOCK_M)
    present = queries < length_q
    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_M, length_q) - 1
    begin, middle, middle_end, end = key_ranges(first, last, shift, length_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)

    z, n = z.to(tl.int64), n.to(tl.int64)
    PACKED: tl.constexpr = cu_seqlens_q_pointer is not None
    q_outer, q_inner, q_row = described_rows(z, q_start, length_q, PACKED)
    k_outer, k_inner, k_row = described_rows(z, k_start, length_k, PACKED)
    heads = noise_heads * GROUP
    PIECES: tl.constexpr = max(1, BLOCK_DV // 64)
    WIDTH: tl.constexpr = BLOCK_DV // PIECES
    rows = token_start + queries  # of the arrays that this kernel writes
    # Without keys, what lambda and gate hold is not read: zeros stay zeros even by NaN.
    scaled = tl.where(length_k > 0, length_q, 0)

    # Map 0 is the noise head's, map i the i-th signal head's. One loop for all: the attention's
    # code exists once, and nothing of the epilogue is alive in registers while it runs, which
    # hoisting out of this loop would bring about. Softmax attention has no map 0.
    for i in tl.range(0 if HAS_NOISE else 1, GROUP + 1, disable_licm=True):
        h = n * GROUP + i - 1
        k_head, v_own_head = n * GROUP // SIGNALS_PER_K1, n // NOISES_PER_V
        q_stride, k_stride = q1_token, k1_token
        if HAS_NOISE:
            is_noise = i == 0
        if DESCRIBED:
            q, k, v_own, q_head = q1, k1, v, h
            if HAS_NOISE:  # noqa: SIM102  known when it is compiled, the other when it runs
                if is_noise:
                    q, k, q_head, k_head = q2, k2, n, n // NOISES_PER_K2
        else:
            q_head = h
            q = q1 + z * q1_batch + q_start * q1_token + h * q1_head
            k = k1 + z * k1_batch + k_start * k1_token + k_head * k1_head
            v_own = v + z * v_batch + k_start * v_token + v_own_head * v_head
            if HAS_NOISE:
                q2_own = q2 + z * q2_batch + q_start * q2_token + n * q2_head
                k2_own = k2 + z * k2_batch + k_start * k2_token + n // NOISES_PER_K2 * k2_head
                q, q_stride = tl.where(is_noise, q2_own, q), tl.where(is_noise, q2_token, q1_token)
                k, k_stride = tl.where(is_noise, k2_own, k), tl.where(is_noise, k2_token, k1_token)
        q_source = rows_of(q, q_stride, q_head, q_outer, q_inner, q_row, DESCRIBED)
        k_source = rows_of(k, k_stride, k_head, k_outer, k_inner, k_row, DESCRIBED)
        v_source = rows_of(v_own, v_token, v_own_head, k_outer, k_inner, k_row, DESCRIBED)
        a, lse, m = _attend(
            q_source, k_source, v_source,
            first, length_q, length_k, shift, begin, middle, middle_end, end, left, right,
            SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, DESCRIBED, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
        if lse1_pointer is not None:
            at = lse1_pointer + h * tokens
            if HAS_NOISE:
                at = tl.where(is_noise, lse2_pointer + n * tokens, at)
            tl.store(at + rows, lse, mask=present)
        if max1_pointer is not None:
            at = max1_pointer + tile * heads + h
            if HAS_NOISE:
                at = tl.where(is_noise, max2_pointer + tile * noise_heads + n, at)
            tl.store(at, tl.max(tl.where(present, m, float("-inf")), axis=0))
        parts = pieces(a, PIECES)
        own = 0 if DESCRIBED else (token_start * heads + h) * DV
        out_own = out if DESCRIBED else out + own
        out_target = rows_of(out_own, heads * DV, h, q_outer, q_inner, q_row, DESCRIBED)
        difference_target = out_target  # a stand-in that is never written
        if difference is not None:
            difference_own = difference if DESCRIBED else difference + own
            difference_target = rows_of(difference_own, heads * DV, h, q_outer, q_inner, q_row, DESCRIBED)
        gate_at = z * gate_batch + q_start * gate_token + h * gate_head
        if HAS_NOISE:
            scratch = scratch_pointer + (token_start * noise_heads + n) * DV
            scratch_stride = noise_heads * DV
            if is_noise:
                if o2 is not None:
                    o2_own = o2 if DESCRIBED else o2 + (token_start * noise_heads + n) * DV
                    target = rows_of(o2_own, scratch_stride, n, q_outer, q_inner, q_row, DESCRIBED)
                for c in tl.static_range(PIECES):
                    at = scratch + c * WIDTH
                    store_tile(at, scratch_stride, first, length_q, parts[c], BLOCK_M, DV - c * WIDTH, WIDTH)
                    if o2 is not None:
                        store_rows(target, first, length_q, c * WIDTH, parts[c], BLOCK_M, DV, WIDTH, DESCRIBED)
                tl.debug_barrier()  # other threads of this program may be the ones to read the scratch tile
            else:
                lam_at = lam_pointer + z * lam_batch + h * lam_head + (q_start + queries) * lam_token
                lam = tl.load(lam_at, mask=queries < scaled, other=0.0).to(tl.float32)
                _finish(
                    parts, lam, scratch, scratch_stride, out_target, difference_target, weight_pointer, gate_pointer,
                    gate_at, gate_token, inverse_rms_pointer, h * tokens + token_start, first, length_q, scaled,
                    out_scale, NORM_EPS, difference is not None, BLOCK_M, DV, WIDTH, PIECES, DESCRIBED,
                )  # fmt: skip
        else:
            _finish(
                parts, None, None, 0, out_target, difference_target, weight_pointer, gate_pointer,
                gate_at, gate_token, inverse_rms_pointer, h * tokens + token_start, first, length_q, scaled,
                out_scale, NORM_EPS, difference is not None, BLOCK_M, DV, WIDTH, PIECES, DESCRIBED,
            )  # fmt: skip
