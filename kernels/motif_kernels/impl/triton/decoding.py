"""Differential attention of a few new queries against a long cache: each cached key and value is
read once.

``_split_kernel``: a program serves one key/value head of one row and a part of its cache. The
signal heads and the noise heads of all groups that use the head, times the new queries, are the
rows of two tiles; a tile of values is multiplied by both maps while it is there. The parts are
joined, and the maps subtracted, in ``decoding_parts.py``.

The cache is contiguous or paged; the number of parts does not depend on lengths that only the GPU
knows. In a launch table, the size is ``tuning.attention_size``.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.attention_tiles import product, to_logits
from motif_kernels.impl.triton.decoding_parts import (
    Parts,
    accumulate,
    part_of_row,
    places,
    processors,
    seen_keys,
    store_part,
)
from motif_kernels.impl.triton.launching import launch, next_power_of_2
from motif_kernels.tuning import attention_size, launch_choice
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache


@triton.jit(do_not_specialize=["seqlen_q", "capacity", "pages", "page_size", "splits", "left", "right"])
def _split_kernel(
    q1_pointer,
    k1_pointer,
    q2_pointer,
    k2_pointer,
    v_pointer,
    lengths_pointer,
    leftpad_pointer,
    table_pointer,
    o1_pointer,
    o2_pointer,
    statistics1_pointer,
    statistics2_pointer,
    q1_batch,
    q1_token,
    q1_head,
    k1_page,
    k1_token,
    k1_head,
    q2_batch,
    q2_token,
    q2_head,
    k2_page,
    k2_token,
    k2_head,
    v_page,
    v_token,
    v_head,
    table_batch,
    seqlen_q,
    capacity,
    pages,
    page_size,
    splits,
    left,
    right,
    kv_heads,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    GROUP: tl.constexpr,
    NOISES: tl.constexpr,
    ROWS1: tl.constexpr,
    ROWS2: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    split = tl.program_id(0) % splits  # a grid has 2^31 programs along its first axis, 65,535 along the others
    z = (tl.program_id(0) // splits).to(tl.int64)
    kv = tl.program_id(1).to(tl.int64)
    first, last, end = part_of_row(
        z, split, splits, lengths_pointer, leftpad_pointer, seqlen_q, capacity, left, HAS_LEFT, BLOCK_N
    )

    signals: tl.constexpr = NOISES * GROUP  # heads of a query in each tile
    rows1 = tl.arange(0, ROWS1)
    tokens1 = rows1 // signals
    heads1 = kv * signals + rows1 % signals
    present1 = tokens1 < seqlen_q
    width = tl.arange(0, BLOCK_D)
    inside = (width < D)[None, :]
    q1_at = z * q1_batch + tokens1 * q1_token + heads1 * q1_head
    q1 = tl.load(q1_pointer + q1_at[:, None] + width[None, :], mask=present1[:, None] & inside, other=0.0)
    position1 = end - seqlen_q + tokens1
    o1 = tl.zeros([ROWS1, BLOCK_DV], tl.float32)
    m1, l1 = tl.full([ROWS1], float("-inf"), tl.float32), tl.zeros([ROWS1], tl.float32)
    if HAS_NOISE:
        rows2 = tl.arange(0, ROWS2)
        tokens2 = rows2 // NOISES
        heads2 = kv * NOISES + rows2 % NOISES
        present2 = tokens2 < seqlen_q
        q2_at = z * q2_batch + tokens2 * q2_token + heads2 * q2_head
        q2 = tl.load(q2_pointer + q2_at[:, None] + width[None, :], mask=present2[:, None] & inside, other=0.0)
        position2 = end - seqlen_q + tokens2
        o2 = tl.zeros([ROWS2, BLOCK_DV], tl.float32)
        m2, l2 = tl.full([ROWS2], float("-inf"), tl.float32), tl.zeros([ROWS2], tl.float32)
    value_width = tl.arange(0, BLOCK_DV)
    for start in tl.range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        held = keys < last
        page, slot = places(z, keys, held, table_pointer, table_batch, page_size, pages, BLOCK_N)
        mask = held[:, None] & inside
        k1_at = page * k1_page + slot * k1_token + kv * k1_head
        v_at = page * v_page + slot * v_token + kv * v_head
        k1 = tl.load(k1_pointer + k1_at[:, None] + width[None, :], mask=mask, other=0.0)
        if HAS_NOISE:
            k2_at = page * k2_page + slot * k2_token + kv * k2_head
            k2 = tl.load(k2_pointer + k2_at[:, None] + width[None, :], mask=mask, other=0.0)
        v_mask = held[:, None] & (value_width < DV)[None, :]
        v = tl.load(v_pointer + v_at[:, None] + value_width[None, :], mask=v_mask, other=0.0)
        s1 = to_logits(product(q1, tl.trans(k1)), SCALE, SOFTCAP)
        seen1 = seen_keys(keys, held, position1, present1, left, right, HAS_LEFT, HAS_RIGHT)
        o1, m1, l1 = accumulate(o1, m1, l1, tl.where(seen1, s1, float("-inf")), v)
        if HAS_NOISE:
            s2 = to_logits(product(q2, tl.trans(k2)), SCALE, SOFTCAP)
            seen2 = seen_keys(keys, held, position2, present2, left, right, HAS_LEFT, HAS_RIGHT)
            o2, m2, l2 = accumulate(o2, m2, l2, tl.where(seen2, s2, float("-inf")), v)

    query = (z * splits + split) * seqlen_q
    at1 = (query + tokens1) * (kv_heads * signals) + heads1
    store_part(o1_pointer, statistics1_pointer, at1, present1, o1, m1, l1, DV, BLOCK_DV)
    if HAS_NOISE:
        at2 = (query + tokens2) * (kv_heads * NOISES) + heads2
        store_part(o2_pointer, statistics2_pointer, at2, present2, o2, m2, l2, DV, BLOCK_DV)


def attend(inputs: AttentionInputs, cache: Cache, options: AttentionOptions) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`.

    All caches have the same number of heads, which divides that of the noise heads, or of the
    softmax heads.
    """
    q1, k1, q2, k2, v, lam = inputs[:6]
    batch, seqlen_q, heads, d = q1.shape
    groups, kv_heads, dv = inputs.noise_heads or heads, v.shape[2], v.shape[3]
    capacity, left, right = cache.capacity(k1), options.left, options.right
    choice = launch_choice("decoding_split", attention_size(d, dv, q1.element_size()), q1.device)
    num_splits = cache.num_splits
    if num_splits is None:
        # Two programs a processor, as long as a part is worth a program of its own.
        wanted = math.ceil(2 * processors(q1.device) / max(1, batch * kv_heads))
        num_splits = max(1, min(wanted, capacity // (4 * choice["block_n"])))
    noises = groups // kv_heads
    parts = Parts(inputs, num_splits)
    launch(
        _split_kernel,
        (num_splits * batch, kv_heads),
        q1,
        k1,
        q2,
        k2,
        v,
        cache.lengths,
        cache.leftpad,
        cache.block_table,
        *parts.tensors,
        *q1.stride()[:3],
        *k1.stride()[:3],
        *((0, 0, 0) if q2 is None else q2.stride()[:3]),
        *((0, 0, 0) if k2 is None else k2.stride()[:3]),
        *v.stride()[:3],
        0 if cache.block_table is None else cache.block_table.stride(0),
        seqlen_q,
        capacity,
        len(k1),
        k1.shape[1],
        num_splits,
        left,
        right,
        kv_heads,
        SCALE=options.softmax_scale,
        SOFTCAP=options.softcap,
        HAS_LEFT=left >= 0,
        HAS_RIGHT=right >= 0,
        HAS_NOISE=lam is not None,
        GROUP=heads // groups,
        NOISES=noises,
        ROWS1=max(16, next_power_of_2(seqlen_q * heads // kv_heads)),
        ROWS2=max(16, next_power_of_2(seqlen_q * noises)),
        D=d,
        BLOCK_N=choice["block_n"],
        BLOCK_D=max(16, next_power_of_2(d)),
        DV=dv,
        BLOCK_DV=max(16, next_power_of_2(dv)),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )
    return parts.join(inputs, options)
