"""Differential attention, backward: a tile's probabilities are recomputed from log-sum-exps.

With dA the gradient of the difference (after the epilogue's own backward), for a group of signal
heads h that share a noise head:

    dO1_h = dA_h,    dO2 = -sum over h of lambda_h dA_h,    dlambda_h = -<dA_h, O2>
    D1_h = <dA_h, O1_h> = <dA_h, A_h> - lambda_h dlambda_h
    D2 = <dO2, O2> = sum over h of lambda_h dlambda_h
    dP_h = dA_h V^T,    dP2 = -sum over h of lambda_h dP_h
    dV = sum over h of (P1_h - lambda_h P2)^T dA_h
    dS = P (dP - D),    dQ = scale dS K,    dK = scale dS^T Q

Three kernels, none with atomics; those that walk take tiles by tensor descriptors or by pointers:

- ``attention_backward_prepare.py`` differentiates the epilogue and leaves dA, dO2, D1, D2 and
  dlambda.
- ``_keys_kernel`` serves a tile of keys of one noise group (or several that share the tile) and
  walks over queries, head by head. With one signal head a noise head, and heads narrow enough, it
  does both maps in one walk, sharing dP and dV's product; otherwise the noise head is one more head
  with dO2: sharing would need more sums than registers hold.
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
    add_products,
    cap_slope,
    document,
    document_tile,
    head_rows,
    inner_products,
    key_ranges,
    load_parts,
    load_rows,
    parts_in_registers,
    product,
    query_ranges,
    store_parts,
    store_tile,
    to_logits,
    visible,
    zero_parts,
)


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
    dk,
    dk_noise,
    dv,
    k,
    k_noise,
    v,
    keys,
    q_rows,
    q_noise_rows,
    d_o_rows,
    lam_pointer,
    lse_pointer,
    lse_noise_pointer,
    delta_pointer,
    delta_noise_pointer,
    dq_pointer,
    dq_noise_pointer,
    lam_token,
    dq_token,
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
    BOTH_MAPS: tl.constexpr,
    SAME_KEYS: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Queries [start, stop) of one head and, with BOTH_MAPS, of the noise head that belongs to it
    alone.

    Maps are (keys, queries): P and dS are then left operands of the products that follow, straight
    from the registers where they were made. What there is one of a query (log-sum-exps, D, lambda)
    is loaded where it is used: a thread has sixteen numbers of each.
    """
    for first in tl.range(start, stop, BLOCK_M):
        queries = first + tl.arange(0, BLOCK_M)
        q = load_parts(q_rows, first, seqlen_q, BLOCK_M, D, BLOCK_D, MASKED, DESCRIBED)
        d_o = load_rows(d_o_rows, first, seqlen_q, BLOCK_M, DV, BLOCK_DV, MASKED, DESCRIBED)
        s = to_logits(inner_products(k, q), SCALE, SOFTCAP)
        lse = _load_row(lse_pointer, 1, queries, seqlen_q, float("inf"), MASKED)
        p = _probabilities(
            s, lse, queries[None, :], keys[:, None], shift, seqlen_k, left, right, MASKED, HAS_LEFT, HAS_RIGHT
        )
        if BOTH_MAPS:
            q_noise = load_parts(q_noise_rows, first, seqlen_q, BLOCK_M, D, BLOCK_D, MASKED, DESCRIBED)
            s_noise = to_logits(inner_products(k_noise, q_noise), SCALE, SOFTCAP)
            lse_noise = _load_row(lse_noise_pointer, 1, queries, seqlen_q, float("inf"), MASKED)
            p_noise = _probabilities(
                s_noise, lse_noise, queries[None, :], keys[:, None], shift, seqlen_k, left, right,
                MASKED, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            lam = _load_row(lam_pointer, lam_token, queries, seqlen_q, 0.0, MASKED)
        p_v = p - lam * p_noise if BOTH_MAPS else p
        if WITH_K:
            dp = product(v, tl.trans(d_o))
            ds = p * (dp - _load_row(delta_pointer, 1, queries, seqlen_q, 0.0, MASKED))
            if SOFTCAP > 0:
                ds *= cap_slope(s, SOFTCAP)
            ds = ds.to(q[0].dtype)
            if BOTH_MAPS:
                ds_noise = p_noise * (-lam * dp - _load_row(delta_noise_pointer, 1, queries, seqlen_q, 0.0, MASKED))
                if SOFTCAP > 0:
                    ds_noise *= cap_slope(s_noise, SOFTCAP)
                ds_noise = ds_noise.to(q[0].dtype)
        # Last, and so under way while the next tiles are waited for.
        if WITH_V:
            dv = product(p_v.to(d_o.dtype), d_o, dv)
        if WITH_K:
            dk = add_products(dk, ds, q)
            if dq_pointer is not None:
                _add_queries(dq_pointer, dq_token, queries, seqlen_q, k, ds, SCALE, D, BLOCK_D)
            if BOTH_MAPS:
                if SAME_KEYS:
                    dk = add_products(dk, ds_noise, q_noise)
                else:
                    dk_noise = add_products(dk_noise, ds_noise, q_noise)
                if dq_pointer is not None:
                    _add_queries(dq_noise_pointer, dq_token, queries, seqlen_q, k_noise, ds_noise, SCALE, D, BLOCK_D)
    return dk, dk_noise, dv


@triton.jit
def _load_row(pointer, stride, queries, seqlen_q, other, MASKED: tl.constexpr):
    """A number for each query, in float32, (1, queries)."""
    at = pointer + queries.to(tl.int64) * stride
    if MASKED:
        return tl.load(at, mask=queries < seqlen_q, other=other).to(tl.float32)[None, :]
    return tl.load(at).to(tl.float32)[None, :]


@triton.jit
def _add_queries(
    pointer,
    stride,
    queries,
    seqlen_q,
    k,
    ds,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Add dQ, ``k^T ds`` (width, queries), to a head's rows."""
    for c in tl.static_range(len(k)):
        tile = product(tl.trans(k[c]), ds) * SCALE
        columns = c * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
        at = pointer + (queries.to(tl.int64) * stride)[None, :] + columns[:, None]
        tl.atomic_add(at, tile, mask=(columns < WIDTH)[:, None] & (queries < seqlen_q)[None, :], sem="relaxed")


@triton.jit(do_not_specialize=NUMBERS)
def _keys_kernel(
    q1,  # these are descriptors, or pointers with the strides below
    k1,
    q2,
    k2,
    v,
    d_a,
    d_o2,
    lam_pointer,
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
    d_a_batch,
    d_a_token,
    d_a_head,
    d_o2_batch,
    d_o2_token,
    d_o2_head,
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
    BOTH_MAPS: tl.constexpr,
    SAME_KEYS: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    GROUP: tl.constexpr,
    NOISES: tl.constexpr,
    SIGNALS_PER_K1: tl.constexpr,
    NOISES_PER_K2: tl.constexpr,
    NOISES_PER_V: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_IN_REGISTERS: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Gradients (tokens, programs, width) of the keys and the values that NOISES noise heads share:
    of both at a time or, where not so many sums fit in registers, WITH_K or WITH_V alone.

    With BOTH_MAPS, a noise head is served together with the one signal head that it has; otherwise
    noise heads are heads like the others, after them. With SAME_KEYS, both maps' keys are k1.
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
    shares = noise_heads // NOISES
    at = key_start * shares + share
    PACKED: tl.constexpr = cu_seqlens_k_pointer is not None
    k1_rows = head_rows(
        k1, n * GROUP // SIGNALS_PER_K1, z, k_start, length_k, k1_batch, k1_token, k1_head, DESCRIBED, PACKED
    )
    k = load_parts(k1_rows, first, length_k, BLOCK_N, D, BLOCK_D, True, DESCRIBED)
    if K_IN_REGISTERS:
        k = parts_in_registers(k)
    k_noise, values = k, 0.0
    dk, dk_noise, dv = 0.0, 0.0, 0.0
    if HAS_NOISE and not SAME_KEYS:
        k2_rows = head_rows(
            k2, n // NOISES_PER_K2, z, k_start, length_k, k2_batch, k2_token, k2_head, DESCRIBED, PACKED
        )
        if BOTH_MAPS:
            k_noise = load_parts(k2_rows, first, length_k, BLOCK_N, D, BLOCK_D, True, DESCRIBED)
    if WITH_K:
        v_rows = head_rows(v, n // NOISES_PER_V, z, k_start, length_k, v_batch, v_token, v_head, DESCRIBED, PACKED)
        values = load_rows(v_rows, first, length_k, BLOCK_N, DV, BLOCK_DV, True, DESCRIBED)
        dk = zero_parts(BLOCK_N, D, BLOCK_D)
        if BOTH_MAPS and not SAME_KEYS:
            dk_noise = zero_parts(BLOCK_N, D, BLOCK_D)
    if WITH_V:
        dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for which in tl.static_range(2 if HAS_NOISE and not BOTH_MAPS else 1):  # signal heads, noise heads
        if which == 0:
            count, q, d_o = NOISES * GROUP, q1, d_a
            q_batch, q_token, q_head = q1_batch, q1_token, q1_head
            d_o_batch, d_o_token, d_o_head = d_a_batch, d_a_token, d_a_head
            lse_pointer, delta_pointer, dq_pointer = lse1_pointer, delta1_pointer, dq1_pointer
        else:
            count, q, d_o = NOISES, q2, d_o2
            q_batch, q_token, q_head = q2_batch, q2_token, q2_head
            d_o_batch, d_o_token, d_o_head = d_o2_batch, d_o2_token, d_o2_head
            lse_pointer, delta_pointer, dq_pointer = lse2_pointer, delta2_pointer, dq2_pointer
            if not SAME_KEYS:
                k = load_parts(k2_rows, first, length_k, BLOCK_N, D, BLOCK_D, True, DESCRIBED)
                if K_IN_REGISTERS:
                    k = parts_in_registers(k)
                if WITH_K:
                    store_parts(dk1_pointer + at * D, shares * D, first, length_k, dk, SCALE, BLOCK_N, D, BLOCK_D)
                    dk = zero_parts(BLOCK_N, D, BLOCK_D)
        heads = noise_heads * count // NOISES
        for j in tl.range(count):
            h = share * count + j
            row = h * tokens + token_start
            q_rows = head_rows(q, h, z, q_start, length_q, q_batch, q_token, q_head, DESCRIBED, PACKED)
            d_o_rows = head_rows(d_o, h, z, q_start, length_q, d_o_batch, d_o_token, d_o_head, DESCRIBED, PACKED)
            q_noise_rows, own_lam_pointer, lse_noise_pointer, delta_noise_pointer = None, None, None, None
            own_dq_pointer, dq_noise_pointer = None, None
            if BOTH_MAPS:
                q_noise_rows = head_rows(q2, h, z, q_start, length_q, q2_batch, q2_token, q2_head, DESCRIBED, PACKED)
                own_lam_pointer = lam_pointer + z * lam_batch + q_start * lam_token + h * lam_head
                lse_noise_pointer = lse2_pointer + row
                delta_noise_pointer = delta2_pointer + row
            if dq_pointer is not None:
                own_dq_pointer = dq_pointer + (token_start * heads + h) * D
                if BOTH_MAPS:
                    dq_noise_pointer = dq2_pointer + (token_start * heads + h) * D
            for part in tl.static_range(3):  # cut by the mask, whole, cut by the mask
                if HAS_RIGHT or part > 0:
                    start = begin if part == 0 else middle if part == 1 else middle_end
                    stop = middle if part == 0 else middle_end if part == 1 else end
                    dk, dk_noise, dv = _walk_queries(
                        dk, dk_noise, dv, k, k_noise, values, keys, q_rows, q_noise_rows, d_o_rows, own_lam_pointer,
                        lse_pointer + row, lse_noise_pointer, delta_pointer + row, delta_noise_pointer,
                        own_dq_pointer, dq_noise_pointer, lam_token, heads * D,
                        start, stop, shift, length_q, length_k, left, right,
                        SCALE, SOFTCAP, part != 1, HAS_LEFT, HAS_RIGHT, BOTH_MAPS, SAME_KEYS, WITH_K, WITH_V,
                        DESCRIBED, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
                    )  # fmt: skip
    if WITH_K:
        if HAS_NOISE and not SAME_KEYS:
            if BOTH_MAPS:
                store_parts(dk1_pointer + at * D, shares * D, first, length_k, dk, SCALE, BLOCK_N, D, BLOCK_D)
                dk = dk_noise
            store_parts(dk2_pointer + at * D, shares * D, first, length_k, dk, SCALE, BLOCK_N, D, BLOCK_D)
        else:
            store_parts(dk1_pointer + at * D, shares * D, first, length_k, dk, SCALE, BLOCK_N, D, BLOCK_D)
    if WITH_V:
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
    k_rows,
    k_noise_rows,
    v_rows,
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
    DESCRIBED: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    for first in tl.range(start, stop, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        k = load_parts(k_rows, first, seqlen_k, BLOCK_N, D, BLOCK_D, MASKED, DESCRIBED)
        v = load_rows(v_rows, first, seqlen_k, BLOCK_N, DV, BLOCK_DV, MASKED, DESCRIBED)
        s = to_logits(inner_products(q, k), SCALE, SOFTCAP)
        p = _probabilities(
            s, lse[:, None], queries[:, None], keys[None, :], shift, seqlen_k, left, right, MASKED, HAS_LEFT, HAS_RIGHT
        )
        dp = product(d_o, tl.trans(v))
        ds = p * (dp - delta[:, None])
        if SOFTCAP > 0:
            ds *= cap_slope(s, SOFTCAP)
        dq = add_products(dq, ds.to(k[0].dtype), k)
        if BOTH_MAPS:
            k = load_parts(k_noise_rows, first, seqlen_k, BLOCK_N, D, BLOCK_D, MASKED, DESCRIBED)
            s = to_logits(inner_products(q_noise, k), SCALE, SOFTCAP)
            p = _probabilities(
                s, lse_noise[:, None], queries[:, None], keys[None, :], shift, seqlen_k, left, right,
                MASKED, HAS_LEFT, HAS_RIGHT,
            )  # fmt: skip
            ds = p * (-lam[:, None] * dp - delta_noise[:, None])
            if SOFTCAP > 0:
                ds *= cap_slope(s, SOFTCAP)
            dq_noise = add_products(dq_noise, ds.to(k[0].dtype), k)
    return dq, dq_noise


@triton.jit(do_not_specialize=NUMBERS)
def _queries_kernel(
    q,  # these are descriptors, or pointers with the strides below
    k,
    q_noise,
    k_noise,
    v,
    d_o,
    lam_pointer,
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
    d_o_batch,
    d_o_token,
    d_o_head,
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
    DESCRIBED: tl.constexpr,
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
    PACKED: tl.constexpr = cu_seqlens_q_pointer is not None
    q_rows = head_rows(q, h, z, q_start, length_q, q_batch, q_token, q_head, DESCRIBED, PACKED)
    d_o_rows = head_rows(d_o, h, z, q_start, length_q, d_o_batch, d_o_token, d_o_head, DESCRIBED, PACKED)
    k_rows = head_rows(k, h // HEADS_PER_K, z, k_start, length_k, k_batch, k_token, k_head, DESCRIBED, PACKED)
    v_rows = head_rows(v, h // HEADS_PER_V, z, k_start, length_k, v_batch, v_token, v_head, DESCRIBED, PACKED)
    own_q = load_parts(q_rows, first, length_q, BLOCK_M, D, BLOCK_D, True, DESCRIBED)
    own_d_o = load_rows(d_o_rows, first, length_q, BLOCK_M, DV, BLOCK_DV, True, DESCRIBED)
    rows = h * tokens + token_start + queries
    lse = tl.load(lse_pointer + rows, mask=present, other=float("inf"))
    delta = tl.load(delta_pointer + rows, mask=present, other=0.0)
    dq = zero_parts(BLOCK_M, D, BLOCK_D)
    if BOTH_MAPS:
        k_noise_rows = head_rows(
            k_noise, h // HEADS_PER_K_NOISE, z, k_start, length_k, k_noise_batch, k_noise_token, k_noise_head,
            DESCRIBED, PACKED,
        )  # fmt: skip
        q_noise_rows = head_rows(
            q_noise, h, z, q_start, length_q, q_noise_batch, q_noise_token, q_noise_head, DESCRIBED, PACKED
        )
        own_q_noise = load_parts(q_noise_rows, first, length_q, BLOCK_M, D, BLOCK_D, True, DESCRIBED)
        lam_at = z * lam_batch + (q_start + queries) * lam_token + h * lam_head
        lam = tl.load(lam_pointer + lam_at, mask=present, other=0.0).to(tl.float32)
        lse_noise = tl.load(lse_noise_pointer + rows, mask=present, other=float("inf"))
        delta_noise = tl.load(delta_noise_pointer + rows, mask=present, other=0.0)
        dq_noise = zero_parts(BLOCK_M, D, BLOCK_D)
    else:  # stand-ins that are never read
        own_q_noise, k_noise_rows, lam, lse_noise, delta_noise, dq_noise = own_q, k_rows, lse, lse, delta, 0.0
        if DESCRIBED and D <= 128:  # as with k in the keys kernel
            own_q = parts_in_registers(own_q)
    for part in tl.static_range(3):  # cut by the mask, whole, cut by the mask
        if HAS_LEFT or part > 0:
            start = begin if part == 0 else middle if part == 1 else middle_end
            stop = middle if part == 0 else middle_end if part == 1 else end
            dq, dq_noise = _walk_keys(
                dq, dq_noise, own_q, own_q_noise, own_d_o, lam, lse, lse_noise, delta, delta_noise, queries,
                k_rows, k_noise_rows, v_rows, start, stop, shift, length_k, left, right,
                SCALE, SOFTCAP, part != 1, HAS_LEFT, HAS_RIGHT, BOTH_MAPS, DESCRIBED,
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    own = token_start * heads + h
    store_parts(dq_pointer + own * D, heads * D, first, length_q, dq, SCALE, BLOCK_M, D, BLOCK_D)
    if BOTH_MAPS:
        store_parts(dq_noise_pointer + own * D, heads * D, first, length_q, dq_noise, SCALE, BLOCK_M, D, BLOCK_D)
