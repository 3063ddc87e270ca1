"""Parts of a cache that programs of decoding attended to apart, and how they are joined.

A part leaves unnormalised outputs, row maxima and row sums in float32. ``_merge_kernel``: a program
joins the parts of one signal head and of its noise head for one query, takes the difference in
float32, applies the epilogue and rounds once. All parts, or as many as registers hold, are loaded
at once: the merge is short, and each wait for memory would be seen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.attention_tiles import product
from motif_kernels.impl.triton.launching import launch, next_power_of_2
from motif_kernels.types import AttentionInputs, AttentionOptions


@triton.jit
def accumulate(o, m, l, s, v):  # noqa: E741
    """One step of the online softmax, for logits s (ROWS, KEYS) with hidden keys at -inf."""
    m_new = tl.maximum(m, tl.max(s, axis=1))
    m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_finite[:, None])
    alpha = tl.exp2(m - m_finite)
    l = l * alpha + tl.sum(p, axis=1)  # noqa: E741
    return product(p.to(v.dtype), v, o * alpha[:, None]), m_new, l


@triton.jit
def store_part(o_pointer, statistics_pointer, at, present, o, m, l, DV: tl.constexpr, BLOCK_DV: tl.constexpr):  # noqa: E741
    columns = tl.arange(0, BLOCK_DV)
    tl.store(o_pointer + at[:, None] * DV + columns[None, :], o, mask=present[:, None] & (columns < DV)[None, :])
    tl.store(statistics_pointer + at * 2, m, mask=present)
    tl.store(statistics_pointer + at * 2 + 1, l, mask=present)


@triton.jit
def part_of_row(
    z,
    split,
    splits,
    lengths_pointer,
    leftpad_pointer,
    seqlen_q,
    capacity,
    left,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First and last place of a part of row z, and where the row ends."""
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
    return first, tl.minimum(first + part, end), end


@triton.jit
def places(z, keys, held, table_pointer, table_batch, page_size, pages, BLOCK_N: tl.constexpr):
    """Page and slot of row z's keys, in 64 bits; a page outside the pool is its first or last."""
    if table_pointer is not None:
        page = tl.load(table_pointer + z * table_batch + keys // page_size, mask=held, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        slot = keys % page_size
    else:
        page = tl.zeros([BLOCK_N], tl.int64) + z
        slot = keys
    return page, slot.to(tl.int64)


@triton.jit
def seen_keys(keys, held, position, present, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """(ROWS, KEYS): which keys the rows see, whose queries stand at ``position``."""
    seen = held[None, :] & present[:, None]
    if HAS_LEFT:
        seen = seen & (keys[None, :] >= position[:, None] - left)
    if HAS_RIGHT:
        seen = seen & (keys[None, :] <= position[:, None] + right)
    return seen


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


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Parts:
    """What the parts of a call leave, as one of their kernels writes it: outputs (B, splits, Sq,
    heads, Dv) and statistics (B, splits, Sq, heads, 2) of signal and of noise heads.
    """

    def __init__(self, inputs: AttentionInputs, splits: int) -> None:
        batch, seqlen_q, heads = inputs.q1.shape[:3]
        dv, noises = inputs.v.shape[3], inputs.noise_heads

        def empty(count: int, last: int) -> Tensor | None:
            if not count:
                return None
            return torch.empty(batch, splits, seqlen_q, count, last, dtype=torch.float32, device=inputs.q1.device)

        self.splits = splits
        self.tensors = empty(heads, dv), empty(noises, dv), empty(heads, 2), empty(noises, 2)

    def join(self, inputs: AttentionInputs, options: AttentionOptions) -> Tensor:
        """The output (B, Sq, Hs, Dv)."""
        q1, lam, norm_weight, gate = inputs.q1, inputs.lam, inputs.norm_weight, inputs.gate
        norm_weight = None if norm_weight is None else norm_weight.contiguous()
        gate = gate.contiguous() if gate is not None and gate.stride(-1) != 1 else gate
        batch, seqlen_q, heads, _ = q1.shape
        groups, dv = inputs.noise_heads or heads, inputs.v.shape[3]
        block_dv = max(16, next_power_of_2(dv))
        out = torch.empty(batch, seqlen_q, heads, dv, dtype=q1.dtype, device=q1.device)
        launch(
            _merge_kernel,
            (batch, seqlen_q, heads),
            *self.tensors,
            lam,
            norm_weight,
            gate,
            out,
            *((0, 0, 0) if lam is None else (0, 0, 0, *lam.stride())[-3:]),
            *((0, 0, 0) if gate is None else gate.stride()[:3]),
            seqlen_q,
            self.splits,
            groups,
            options.out_scale,
            NORM_EPS=options.norm_eps,
            GROUP=heads // groups,
            PARTS=min(next_power_of_2(self.splits), max(1, _MERGED_NUMBERS // block_dv)),
            DV=dv,
            BLOCK_DV=block_dv,
            num_warps=8,
        )
        return out
