"""Differential attention of a few new queries against a long cache: each cached key and value is
read once.

``_split_kernel``: a program serves one key/value head of one row and a part of its cache. The
signal heads and the noise heads of all groups that use the head, times the new queries, are the
rows of two tiles; a tile of values is multiplied by both maps while it is there. It leaves
unnormalised outputs, row maxima and row sums in float32.

``_merge_kernel``: a program joins the parts of one signal head and of its noise head for one query,
takes the difference in float32, applies the epilogue and rounds once. All parts, or as many as
registers hold, are loaded at once: the merge is short, and each wait for memory would be seen.

The cache is contiguous or paged; the number of parts does not depend on lengths that only the GPU
knows. In a launch table, the size is ``tuning.attention_size``.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.attention_tiles import product, to_logits
from motif_kernels.impl.triton.launching import launch, next_power_of_2
from motif_kernels.tuning import attention_size, launch_choice
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache


@triton.jit
def _accumulate(o, m, l, s, v):  # noqa: E741
    """One step of the online softmax, for logits s (ROWS, KEYS) with hidden keys at -inf."""
    m_new = tl.maximum(m, tl.max(s, axis=1))
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_finite[:, None])
    alpha = tl.exp2(m - m_finite)
    l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
    return product(p.to(v.dtype), v, o * alpha[:, None]), m_new, l


@triton.jit
def _store_part(o_pointer, statistics_pointer, at, present, o, m, l, DV: tl.constexpr, BLOCK_DV: tl.constexpr):  # noqa: E741
    columns = tl.arange(0, BLOCK_DV)
    tl.store(o_pointer + at[:, None] * DV + columns[None, :], o, mask=present[:, None] & (columns < DV)[None, :])
    tl.store(statistics_pointer + at * 2, m, mask=present)
    tl.store(statistics_pointer + at * 2 + 1, l, mask=present)


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
    # Lengths and pages are not checked where that would stall the stream: nothing outside the cache
    # is read even so.
    end = tl.minimum(tl.load(lengths_pointer + z), capacity)
    begin = 0
    if leftpad_pointer is not None:
        begin = tl.maximum(tl.load(leftpad_pointer + z), 0)
    if HAS_LEFT:  # what lies before the first query's window is not read
        begin = tl.maximum(begin, end - seqlen_q - left)
    part = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), splits), BLOCK_N) * BLOCK_N
    first = begin + split * part
    last = tl.minimum(first + part, end)

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
        if table_pointer is not None:
            page = tl.load(table_pointer + z * table_batch + keys // page_size, mask=held, other=0).to(tl.int64)
            page = tl.minimum(tl.maximum(page, 0), pages - 1)
            slot = keys % page_size
        else:
            page = tl.zeros([BLOCK_N], tl.int64) + z
            slot = keys
        mask = held[:, None] & inside
        k1_at = page * k1_page + slot.to(tl.int64) * k1_token + kv * k1_head
        v_at = page * v_page + slot.to(tl.int64) * v_token + kv * v_head
        k1 = tl.load(k1_pointer + k1_at[:, None] + width[None, :], mask=mask, other=0.0)
        if HAS_NOISE:
            k2_at = page * k2_page + slot.to(tl.int64) * k2_token + kv * k2_head
            k2 = tl.load(k2_pointer + k2_at[:, None] + width[None, :], mask=mask, other=0.0)
        v_mask = held[:, None] & (value_width < DV)[None, :]
        v = tl.load(v_pointer + v_at[:, None] + value_width[None, :], mask=v_mask, other=0.0)
        s1 = to_logits(product(q1, tl.trans(k1)), SCALE, SOFTCAP)
        seen1 = held[None, :] & present1[:, None]
        if HAS_LEFT:
            seen1 = seen1 & (keys[None, :] >= position1[:, None] - left)
        if HAS_RIGHT:
            seen1 = seen1 & (keys[None, :] <= position1[:, None] + right)
        o1, m1, l1 = _accumulate(o1, m1, l1, tl.where(seen1, s1, float("-inf")), v)
        if HAS_NOISE:
            s2 = to_logits(product(q2, tl.trans(k2)), SCALE, SOFTCAP)
            seen2 = held[None, :] & present2[:, None]
            if HAS_LEFT:
                seen2 = seen2 & (keys[None, :] >= position2[:, None] - left)
            if HAS_RIGHT:
                seen2 = seen2 & (keys[None, :] <= position2[:, None] + right)
            o2, m2, l2 = _accumulate(o2, m2, l2, tl.where(seen2, s2, float("-inf")), v)

    query = (z * splits + split) * seqlen_q
    at1 = (query + tokens1) * (kv_heads * signals) + heads1
    _store_part(o1_pointer, statistics1_pointer, at1, present1, o1, m1, l1, DV, BLOCK_DV)
    if HAS_NOISE:
        at2 = (query + tokens2) * (kv_heads * NOISES) + heads2
        _store_part(o2_pointer, statistics2_pointer, at2, present2, o2, m2, l2, DV, BLOCK_DV)


@triton.jit
def _load_parts(
    o_pointer, statistics_pointer, first, step, parts, splits, columns, DV: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Parts (PARTS,) of one head of one query: outputs (PARTS, BLOCK_DV), row maxima and sums."""
    held = parts < splits
    at = first + parts * step
    m = tl.load(statistics_pointer + at * 2, mask=held, other=float("-inf"))
    l = tl.load(statistics_pointer + at * 2 + 1, mask=held, other=0.0)  # noqa: E741
    mask = held[:, None] & (columns < DV)[None, :]
    return tl.load(o_pointer + at[:, None] * DV + columns[None, :], mask=mask, other=0.0), m, l


@triton.jit
def _add_parts(o, m, l, parts_o, parts_m, parts_l):  # noqa: E741
    """What was joined so far, (BLOCK_DV,) and two numbers, and some more parts."""
    m_new = tl.maximum(m, tl.max(parts_m, axis=0))
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    factor, alpha = tl.exp2(parts_m - m_finite), tl.exp2(m - m_finite)
    l = l * alpha + tl.sum(factor * parts_l, axis=0)  # noqa: E741
    return o * alpha + tl.sum(factor[:, None] * parts_o, axis=0), m_new, l


@triton.jit
def _normalised(o, l):  # noqa: E741
    """0 if no key was seen."""
    return tl.where(l == 0, 0.0, o / tl.where(l == 0, 1.0, l))


@triton.jit(do_not_specialize=["seqlen_q", "splits"])
def _merge_kernel(
    o1_pointer,
    o2_pointer,
    statistics1_pointer,
    statistics2_pointer,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    out_pointer,
    lam_batch,
    lam_token,
    lam_head,
    gate_batch,
    gate_token,
    gate_head,
    seqlen_q,
    splits,
    noise_heads,
    out_scale,
    NORM_EPS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    z = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64)
    h = tl.program_id(2).to(tl.int64)
    n = h // GROUP
    heads = noise_heads * GROUP
    query = z * splits * seqlen_q + token
    columns = tl.arange(0, BLOCK_DV)
    inside = columns < DV
    a, m1, l1 = tl.zeros([BLOCK_DV], tl.float32), float("-inf"), 0.0
    if lam_pointer is not None:
        noise, m2, l2 = tl.zeros([BLOCK_DV], tl.float32), float("-inf"), 0.0
    for start in tl.range(0, splits, PARTS):
        parts = start + tl.arange(0, PARTS)
        o1_parts, m1_parts, l1_parts = _load_parts(
            o1_pointer, statistics1_pointer, query * heads + h, seqlen_q * heads, parts, splits, columns, DV, BLOCK_DV
        )
        if lam_pointer is not None:
            first, step = query * noise_heads + n, seqlen_q * noise_heads
            o2_parts, m2_parts, l2_parts = _load_parts(
                o2_pointer, statistics2_pointer, first, step, parts, splits, columns, DV, BLOCK_DV
            )
            noise, m2, l2 = _add_parts(noise, m2, l2, o2_parts, m2_parts, l2_parts)
        a, m1, l1 = _add_parts(a, m1, l1, o1_parts, m1_parts, l1_parts)
    a = _normalised(a, l1)
    if lam_pointer is not None:
        lam = tl.load(lam_pointer + z * lam_batch + token * lam_token + h * lam_head).to(tl.float32)
        a -= lam * _normalised(noise, l2)
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + columns, mask=inside, other=0.0).to(tl.float32)
        a *= tl.rsqrt(tl.sum(a * a, axis=0) / DV + NORM_EPS) * weight
    if gate_pointer is not None:
        gate_at = z * gate_batch + token * gate_token + h * gate_head
        a *= tl.sigmoid(tl.load(gate_pointer + gate_at + columns, mask=inside, other=0.0).to(tl.float32))
    out_at = ((z * seqlen_q + token) * heads + h) * DV
    tl.store(out_pointer + out_at + columns, (a * out_scale).to(out_pointer.dtype.element_ty), mask=inside)


_MERGED_NUMBERS = 1 << 14  # of a map's outputs that a program of the merge loads at once: 64 a thread


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def attend(inputs: AttentionInputs, cache: Cache, options: AttentionOptions) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`.

    All caches have the same number of heads, which divides that of the noise heads, or of the
    softmax heads.
    """
    q1, k1, q2, k2, v, lam, norm_weight, gate = inputs
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    gate = gate.contiguous() if gate is not None and gate.stride(-1) != 1 else gate
    batch, seqlen_q, heads, d = q1.shape
    groups, kv_heads, dv = inputs.noise_heads or heads, v.shape[2], v.shape[3]
    capacity, left, right = cache.capacity(k1), options.left, options.right
    choice = launch_choice("decoding_split", attention_size(d, dv, q1.element_size()), q1.device)
    num_splits = cache.num_splits
    if num_splits is None:
        # Two programs a processor, as long as a part is worth a program of its own.
        wanted = math.ceil(2 * _processors(q1.device) / max(1, batch * kv_heads))
        num_splits = max(1, min(wanted, capacity // (4 * choice["block_n"])))
    noises = groups // kv_heads
    widths = {"DV": dv, "BLOCK_DV": max(16, next_power_of_2(dv))}

    def parts(count: int, *last: int) -> Tensor | None:
        if not count:
            return None
        return torch.empty(batch, num_splits, seqlen_q, count, *last, dtype=torch.float32, device=q1.device)

    o1, statistics1 = parts(heads, dv), parts(heads, 2)
    o2, statistics2 = parts(inputs.noise_heads, dv), parts(inputs.noise_heads, 2)
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
        o1,
        o2,
        statistics1,
        statistics2,
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
        **widths,
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )
    out = torch.empty(batch, seqlen_q, heads, dv, dtype=q1.dtype, device=q1.device)
    launch(
        _merge_kernel,
        (batch, seqlen_q, heads),
        o1,
        o2,
        statistics1,
        statistics2,
        lam,
        norm_weight,
        gate,
        out,
        *((0, 0, 0) if lam is None else (0, 0, 0, *lam.stride())[-3:]),
        *((0, 0, 0) if gate is None else gate.stride()[:3]),
        seqlen_q,
        num_splits,
        groups,
        options.out_scale,
        NORM_EPS=options.norm_eps,
        GROUP=heads // groups,
        PARTS=min(next_power_of_2(num_splits), max(1, _MERGED_NUMBERS // widths["BLOCK_DV"])),
        **widths,
        num_warps=8,
    )
    return out
