"""Differential attention, backward: a tile's probabilities are recomputed from log-sum-exps.

With dA the gradient of the difference (after the epilogue's own backward), for a group of signal
heads h that share a noise head:

    dO1_h = dA_h,    dO2 = -sum over h of lambda_h dA_h,    dlambda_h = -<dA_h, O2>
    D1_h = <dA_h, O1_h> = <dA_h, A_h> - lambda_h dlambda_h
    D2 = <dO2, O2> = sum over h of lambda_h dlambda_h
    dP_h = dA_h V^T,    dP2 = -sum over h of lambda_h dP_h
    dV = sum over h of (P1_h - lambda_h P2)^T dA_h
    dS = P (dP - D),    dQ = scale dS K,    dK = scale dS^T Q

Three kernels, none with atomics:

- ``_prepare_kernel`` differentiates the epilogue and leaves dA, dO2, D1, D2 and dlambda.
- ``_keys_kernel`` serves a tile of keys of one noise group (or several that share the tile) and
  walks over queries. dP_h is computed once and shared by the signal and the noise map, and one
  product per signal head gives dV of both.
- ``_queries_kernel`` serves a tile of queries and walks over keys. With one signal head a noise
  head, and heads narrow enough, it does both maps in one walk, again sharing dP; otherwise each map
  has programs of its own (sharing would need g + 1 accumulators), and dO2 V^T costs less than going
  through the group again.

With atomics allowed, the keys kernel adds dQ in float32 as it goes and the queries kernel is not
needed: less work, but sums in an order that differs from run to run.
"""

import triton
import triton.language as tl

from motif_kernels.impl.triton.attention_tiles import (
    NUMBERS,
    cap_slope,
    document,
    document_tile,
    key_ranges,
    load_tile,
    product,
    query_ranges,
    store_tile,
    to_logits,
    visible,
)


@triton.jit(do_not_specialize=["tokens"])
def _prepare_kernel(
    grad_pointer,
    a_pointer,
    o2_pointer,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    inverse_rms_pointer,
    lse1_pointer,
    d_a_pointer,
    d_o2_pointer,
    delta1_pointer,
    delta2_pointer,
    d_lam_pointer,
    d_weight_pointer,
    d_gate_pointer,
    tokens,
    noise_heads,
    grad_token,
    grad_head,
    lam_token,
    lam_head,
    gate_token,
    gate_head,
    out_scale,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """A program goes through TILES tiles of PAIRS (token, noise head) pairs."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK_DV)
    heads = noise_heads * GROUP
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + columns, mask=columns < DV, other=0.0).to(tl.float32)[None, :]
        d_weight = tl.zeros([PAIRS, BLOCK_DV], tl.float32)
    for tile in tl.range(TILES):
        pairs = (program * TILES + tile) * PAIRS + tl.arange(0, PAIRS)
        present = pairs < tokens * noise_heads
        # Divided in 32 bits, which is many times faster; offsets need 64.
        t, n = (pairs // noise_heads).to(tl.int64), (pairs % noise_heads).to(tl.int64)
        mask = present[:, None] & (columns < DV)[None, :]
        at = ((t * noise_heads + n) * DV)[:, None] + columns[None, :]
        if HAS_NOISE:
            o2 = tl.load(o2_pointer + at, mask=mask, other=0.0).to(tl.float32)
            d_o2 = tl.zeros([PAIRS, BLOCK_DV], tl.float32)
            delta2 = tl.zeros([PAIRS], tl.float32)
        for i in tl.range(GROUP):
            h = n * GROUP + i
            own = ((t * heads + h) * DV)[:, None] + columns[None, :]  # in contiguous tensors (T, Hs, Dv)
            given = (t * grad_token + h * grad_head)[:, None] + columns[None, :]
            # A fully masked row passes no gradient, whatever stands there.
            seen = tl.load(lse1_pointer + h * tokens + t, mask=present, other=float("inf")) != float("inf")
            seen_mask = mask & seen[:, None]
            g = tl.load(grad_pointer + given, mask=seen_mask, other=0.0).to(tl.float32) * out_scale
            a = tl.load(a_pointer + own, mask=mask, other=0.0).to(tl.float32)
            if HAS_NOISE:
                lam = tl.load(lam_pointer + t * lam_token + h * lam_head, mask=seen, other=0.0).to(tl.float32)
            if gate_pointer is not None:
                gate_at = (t * gate_token + h * gate_head)[:, None] + columns[None, :]
                gate = tl.load(gate_pointer + gate_at, mask=seen_mask, other=0.0).to(tl.float32)
                s = 1 / (1 + tl.exp(-gate))
                g *= s
                d_gate = g * a * (1 - s)
                tl.store(d_gate_pointer + own, d_gate.to(d_gate_pointer.dtype.element_ty), mask=mask)
            if weight_pointer is not None:
                r = tl.load(inverse_rms_pointer + h * tokens + t, mask=seen, other=0.0)[:, None]
                normed = a * r
                d_weight += g * normed
                g *= weight
                g = r * (g - normed * (tl.sum(g * normed, axis=1, keep_dims=True) / DV))
            # What the other kernels multiply is rounded: D must belong to the same numbers.
            rounded = g.to(d_a_pointer.dtype.element_ty)
            tl.store(d_a_pointer + own, rounded, mask=mask)
            g = rounded.to(tl.float32)
            delta1 = tl.sum(g * a, axis=1)
            if HAS_NOISE:
                d_lam = -tl.sum(g * o2, axis=1)
                tl.store(d_lam_pointer + t * heads + h, d_lam, mask=present)
                delta1 -= lam * d_lam
                delta2 += lam * d_lam
                d_o2 -= lam[:, None] * g
            tl.store(delta1_pointer + h * tokens + t, delta1, mask=present)
        if HAS_NOISE:
            tl.store(delta2_pointer + n * tokens + t, delta2, mask=present)
        if d_o2_pointer is not None:
            tl.store(d_o2_pointer + at, d_o2.to(d_o2_pointer.dtype.element_ty), mask=mask)
    if weight_pointer is not None:
        d_weight_at = d_weight_pointer + program.to(tl.int64) * DV + columns
        tl.store(d_weight_at, tl.sum(d_weight, axis=0), mask=columns < DV)


@triton.jit
def _probabilities(
    s,
    lse,
    queries,
    keys,
    shift,
    seqlen_k,
    left,
    right,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """exp2(s - lse), 0 where hidden; queries, keys and lse broadcast against s."""
    p = tl.exp2(s - lse)
    if MASKED:
        p = tl.where(visible(queries, keys, shift, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
    return p


@triton.jit
def _walk_queries(
    dk1,
    dk2,
    dv,
    k1,
    k2,
    v,
    keys,
    n,
    q1_pointer,
    q2_pointer,
    d_a_pointer,
    lam_pointer,
    lse1_pointer,
    lse2_pointer,
    delta1_pointer,
    delta2_pointer,
    dq1_pointer,
    dq2_pointer,
    q1_token,
    q1_head,
    q2_token,
    lam_token,
    lam_head,
    noise_heads,
    tokens,
    start,
    stop,
    shift,
    seqlen_q,
    seqlen_k,
    left,
    right,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Queries [start, stop) of noise head n and its signal heads; without noise, of head n.

    Maps are (queries, keys): what there is one of a query (log-sum-exps, D, lambda) then costs a
    thread a few registers. Transposed, as some kernels have them, those alone would take eighty.
    """
    HAS_NOISE: tl.constexpr = lam_pointer is not None
    heads = noise_heads * GROUP
    for first in tl.range(start, stop, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        rows = queries.to(tl.int64)
        present = queries < seqlen_q
        if HAS_NOISE:
            q2 = load_tile(q2_pointer, q2_token, first, seqlen_q, BLOCK_M, D, BLOCK_D, MASKED)
            lse2 = tl.load(lse2_pointer + rows, mask=present, other=float("inf"))
            delta2 = tl.load(delta2_pointer + rows, mask=present, other=0.0)
            s2 = to_logits(product(q2, tl.trans(k2)), SCALE, SOFTCAP)
            p2 = _probabilities(
                s2,
                lse2[:, None],
                queries[:, None],
                keys[None, :],
                shift,
                seqlen_k,
                left,
                right,
                MASKED,
                HAS_LEFT,
                HAS_RIGHT,
            )
            dp2 = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i in tl.range(GROUP):
            h = n * GROUP + i
            q1 = load_tile(q1_pointer + h * q1_head, q1_token, first, seqlen_q, BLOCK_M, D, BLOCK_D, MASKED)
            d_a = load_tile(d_a_pointer + h * DV, heads * DV, first, seqlen_q, BLOCK_M, DV, BLOCK_DV, MASKED)
            if HAS_NOISE:
                lam = tl.load(lam_pointer + rows * lam_token + h * lam_head, mask=present, other=0.0).to(tl.float32)
            lse1 = tl.load(lse1_pointer + h * tokens + rows, mask=present, other=float("inf"))
            delta1 = tl.load(delta1_pointer + h * tokens + rows, mask=present, other=0.0)
            s1 = to_logits(product(q1, tl.trans(k1)), SCALE, SOFTCAP)
            p1 = _probabilities(
                s1, lse1[:, None], queries[:, None], keys[None, :], shift, seqlen_k, left, right,
                MASKED, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            dp = product(d_a, tl.trans(v))
            p = p1
            if HAS_NOISE:
                p -= lam[:, None] * p2
            dv = product(tl.trans(p.to(d_a.dtype)), d_a, dv)
            ds1 = p1 * (dp - delta1[:, None])
            if SOFTCAP > 0:
                ds1 *= cap_slope(s1, SOFTCAP)
            ds1 = ds1.to(q1.dtype)
            dk1 = product(tl.trans(ds1), q1, dk1)
            if HAS_NOISE:
                dp2 -= lam[:, None] * dp
            if dq1_pointer is not None:
                _add_tile(dq1_pointer + h * D, heads * D, rows, present, product(ds1, k1) * SCALE, D, BLOCK_D)
        if HAS_NOISE:
            ds2 = p2 * (dp2 - delta2[:, None])
            if SOFTCAP > 0:
                ds2 *= cap_slope(s2, SOFTCAP)
            ds2 = ds2.to(q2.dtype)
            dk2 = product(tl.trans(ds2), q2, dk2)
            if dq2_pointer is not None:
                _add_tile(dq2_pointer + n * D, noise_heads * D, rows, present, product(ds2, k2) * SCALE, D, BLOCK_D)
    return dk1, dk2, dv


@triton.jit
def _add_tile(pointer, stride, rows, present, tile, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    columns = tl.arange(0, BLOCK_WIDTH)
    at = pointer + rows[:, None] * stride + columns[None, :]
    tl.atomic_add(at, tile, mask=present[:, None] & (columns < WIDTH)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def _keys_kernel(
    q1_pointer,
    k1_pointer,
    q2_pointer,
    k2_pointer,
    v_pointer,
    lam_pointer,
    d_a_pointer,
    lse1_pointer,
    lse2_pointer,
    delta1_pointer,
    delta2_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    dk1_pointer,
    dk2_pointer,
    dv_pointer,
    dq1_pointer,
    dq2_pointer,
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
    seqlen_q,
    seqlen_k,
    tokens,
    key_tokens,
    documents,
    left,
    right,
    noise_heads,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
    NOISES: tl.constexpr,
    SIGNALS_PER_K1: tl.constexpr,
    NOISES_PER_K2: tl.constexpr,
    NOISES_PER_V: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """dK1, dK2 and dV (tokens, programs, width) of NOISES noise heads that share their key and
    value heads.
    """
    share = tl.program_id(1)
    z, first = tl.program_id(2), tl.program_id(0) * BLOCK_N
    if cu_seqlens_k_pointer is not None:
        z, first = document_tile(tl.program_id(0), cu_seqlens_k_pointer, documents, key_tokens, BLOCK_N)
    q_start, token_start, length_q = document(z, cu_seqlens_q_pointer, seqlen_q, tokens, documents, 0)
    k_start, key_start, length_k = document(z, cu_seqlens_k_pointer, seqlen_k, key_tokens, documents, key_tokens)
    if (first < 0) | (first >= length_k):
        return
    keys = first + tl.arange(0, BLOCK_N)
    shift = length_k - length_q
    begin, middle, middle_end, end = query_ranges(
        first, first + BLOCK_N - 1, shift, length_q, length_k, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT
    )
    z, share = z.to(tl.int64), share.to(tl.int64)
    n = share * NOISES
    k1 = load_tile(
        k1_pointer + z * k1_batch + k_start * k1_token + n * GROUP // SIGNALS_PER_K1 * k1_head,
        k1_token, first, length_k, BLOCK_N, D, BLOCK_D, True,
    )  # fmt: skip
    if HAS_NOISE:
        k2 = load_tile(
            k2_pointer + z * k2_batch + k_start * k2_token + n // NOISES_PER_K2 * k2_head,
            k2_token, first, length_k, BLOCK_N, D, BLOCK_D, True,
        )  # fmt: skip
    else:  # a stand-in that is never read
        k2 = k1
    v = load_tile(
        v_pointer + z * v_batch + k_start * v_token + n // NOISES_PER_V * v_head,
        v_token, first, length_k, BLOCK_N, DV, BLOCK_DV, True,
    )  # fmt: skip
    q1_pointer += z * q1_batch + q_start * q1_token
    q2_pointer += z * q2_batch + q_start * q2_token
    if HAS_NOISE:
        lam_pointer += z * lam_batch + q_start * lam_token
    heads = noise_heads * GROUP
    d_a_pointer += token_start * heads * DV
    lse1_pointer += token_start
    lse2_pointer += token_start
    delta1_pointer += token_start
    delta2_pointer += token_start
    if dq1_pointer is not None:
        dq1_pointer += token_start * heads * D
        dq2_pointer += token_start * noise_heads * D
    dk1 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk2 = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for j in tl.range(NOISES):
        head = n + j
        for part in tl.static_range(3):  # cut by the mask, whole, cut by the mask
            if HAS_RIGHT or part > 0:
                start = begin if part == 0 else middle if part == 1 else middle_end
                stop = middle if part == 0 else middle_end if part == 1 else end
                dk1, dk2, dv = _walk_queries(
                    dk1, dk2, dv, k1, k2, v, keys, head, q1_pointer, q2_pointer + head * q2_head, d_a_pointer,
                    lam_pointer, lse1_pointer, lse2_pointer + head * tokens, delta1_pointer,
                    delta2_pointer + head * tokens, dq1_pointer, dq2_pointer, q1_token, q1_head, q2_token, lam_token,
                    lam_head, noise_heads, tokens, start, stop, shift, length_q, length_k, left, right,
                    SCALE, SOFTCAP, part != 1, HAS_LEFT, HAS_RIGHT, GROUP, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
    shares = noise_heads // NOISES
    at = key_start * shares + share
    store_tile(dk1_pointer + at * D, shares * D, first, length_k, dk1 * SCALE, BLOCK_N, D, BLOCK_D)
    if HAS_NOISE:
        store_tile(dk2_pointer + at * D, shares * D, first, length_k, dk2 * SCALE, BLOCK_N, D, BLOCK_D)
    store_tile(dv_pointer + at * DV, shares * DV, first, length_k, dv, BLOCK_N, DV, BLOCK_DV)


@triton.jit
def _walk_keys(
    dq,
    dq_noise,
    q,
    q_noise,
    d_o,
    lam,
    lse,
    lse_noise,
    delta,
    delta_noise,
    queries,
    k_pointer,
    k_noise_pointer,
    v_pointer,
    k_token,
    k_noise_token,
    v_token,
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
    BOTH_MAPS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = load_tile(k_pointer, k_token, first, seqlen_k, BLOCK_N, D, BLOCK_D, MASKED)
        v = load_tile(v_pointer, v_token, first, seqlen_k, BLOCK_N, DV, BLOCK_DV, MASKED)
        s = to_logits(product(q, tl.trans(k)), SCALE, SOFTCAP)
        p = _probabilities(
            s, lse[:, None], queries[:, None], keys[None, :], shift, seqlen_k, left, right, MASKED, HAS_LEFT, HAS_RIGHT
        )
        dp = product(d_o, tl.trans(v))
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0:
            ds *= cap_slope(s, SOFTCAP)
        dq = product(ds.to(k.dtype), k, dq)
        if BOTH_MAPS:
            k = load_tile(k_noise_pointer, k_noise_token, first, seqlen_k, BLOCK_N, D, BLOCK_D, MASKED)
            s = to_logits(product(q_noise, tl.trans(k)), SCALE, SOFTCAP)
            p = _probabilities(
                s, lse_noise[:, None], queries[:, None], keys[None, :], shift, seqlen_k, left, right,
                MASKED, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            ds = p * (-lam[:, None] * dp - delta_noise[:, None])
            if SOFTCAP > 0:
                ds *= cap_slope(s, SOFTCAP)
            dq_noise = product(ds.to(k.dtype), k, dq_noise)
    return dq, dq_noise


@triton.jit(do_not_specialize=NUMBERS)
def _queries_kernel(
    q_pointer,
    k_pointer,
    q_noise_pointer,
    k_noise_pointer,
    v_pointer,
    lam_pointer,
    d_o_pointer,
    lse_pointer,
    lse_noise_pointer,
    delta_pointer,
    delta_noise_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    dq_pointer,
    dq_noise_pointer,
    q_batch,
    q_token,
    q_head,
    k_batch,
    k_token,
    k_head,
    q_noise_batch,
    q_noise_token,
    q_noise_head,
    k_noise_batch,
    k_noise_token,
    k_noise_head,
    v_batch,
    v_token,
    v_head,
    lam_batch,
    lam_token,
    lam_head,
    seqlen_q,
    seqlen_k,
    tokens,
    key_tokens,
    documents,
    left,
    right,
    heads,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTH_MAPS: tl.constexpr,
    HEADS_PER_K: tl.constexpr,
    HEADS_PER_K_NOISE: tl.constexpr,
    HEADS_PER_V: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Gradient dQ (tokens, heads, D) of one head and, with BOTH_MAPS, of the noise head that
    belongs to it alone.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    z, first = tl.program_id(2), block * BLOCK_M
    if cu_seqlens_q_pointer is not None:
        z, first = document_tile(block, cu_seqlens_q_pointer, documents, tokens, BLOCK_M)
    q_start, token_start, length_q = document(z, cu_seqlens_q_pointer, seqlen_q, tokens, documents, tokens)
    k_start, _, length_k = document(z, cu_seqlens_k_pointer, seqlen_k, key_tokens, documents, 0)
    if (first < 0) | (first >= length_q):
        return
    queries = first + tl.arange(0, BLOCK_M)
    present = queries < length_q
    shift = length_k - length_q
    last = tl.minimum(first + BLOCK_M, length_q) - 1
    begin, middle, middle_end, end = key_ranges(first, last, shift, length_k, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    z, h = z.to(tl.int64), h.to(tl.int64)
    rows = token_start + queries
    k_pointer += z * k_batch + k_start * k_token + h // HEADS_PER_K * k_head
    v_pointer += z * v_batch + k_start * v_token + h // HEADS_PER_V * v_head
    q = load_tile(
        q_pointer + z * q_batch + q_start * q_token + h * q_head, q_token, first, length_q, BLOCK_M, D, BLOCK_D, True
    )
    own = token_start * heads + h
    d_o = load_tile(d_o_pointer + own * DV, heads * DV, first, length_q, BLOCK_M, DV, BLOCK_DV, True)
    lse = tl.load(lse_pointer + h * tokens + rows, mask=present, other=float("inf"))
    delta = tl.load(delta_pointer + h * tokens + rows, mask=present, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if BOTH_MAPS:
        k_noise_pointer += z * k_noise_batch + k_start * k_noise_token + h // HEADS_PER_K_NOISE * k_noise_head
        q_noise = load_tile(
            q_noise_pointer + z * q_noise_batch + q_start * q_noise_token + h * q_noise_head,
            q_noise_token, first, length_q, BLOCK_M, D, BLOCK_D, True,
        )  # fmt: skip
        lam_at = z * lam_batch + (q_start + queries) * lam_token + h * lam_head
        lam = tl.load(lam_pointer + lam_at, mask=present, other=0.0).to(tl.float32)
        lse_noise = tl.load(lse_noise_pointer + h * tokens + rows, mask=present, other=float("inf"))
        delta_noise = tl.load(delta_noise_pointer + h * tokens + rows, mask=present, other=0.0)
        dq_noise = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    else:  # stand-ins that are never read
        q_noise, lam, lse_noise, delta_noise, dq_noise = q, lse, lse, delta, 0.0
    for part in tl.static_range(3):  # cut by the mask, whole, cut by the mask
        if HAS_LEFT or part > 0:
            start = begin if part == 0 else middle if part == 1 else middle_end
            stop = middle if part == 0 else middle_end if part == 1 else end
            dq, dq_noise = _walk_keys(
                dq, dq_noise, q, q_noise, d_o, lam, lse, lse_noise, delta, delta_noise, queries,
                k_pointer, k_noise_pointer, v_pointer, k_token, k_noise_token, v_token,
                start, stop, shift, length_k, left, right,
                SCALE, SOFTCAP, part != 1, HAS_LEFT, HAS_RIGHT, BOTH_MAPS, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    store_tile(dq_pointer + own * D, heads * D, first, length_q, dq * SCALE, BLOCK_M, D, BLOCK_D)
    if BOTH_MAPS:
        store_tile(dq_noise_pointer + own * D, heads * D, first, length_q, dq_noise * SCALE, BLOCK_M, D, BLOCK_D)
