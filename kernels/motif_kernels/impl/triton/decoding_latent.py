"""Differential attention of a few new queries against a cache of latents, which are keys and values
in one: the absorbed form of multi-head latent attention.

A cached token is one vector: all D columns, the latent and the rotated ones, are the key; the first
Dv, the latent, are the value. Every head reads it, signal and noise alike, so that all heads times
the new queries are the rows of one matrix. A program serves a tile of rows and a part of a row's
cache; a tile of latents is in shared memory once, and is multiplied twice. Tiles of rows of one
part are neighbours in the grid: the second finds the latents in the GPU's cache.

The parts are joined, and the maps subtracted, in ``decoding_parts.py``: in latent space, before
what follows projects the signal heads up.

In a launch table, the size is the rows of a batch entry; ``programs`` is how many a processor has
room for.
"""

import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.attention_tiles import to_logits
from motif_kernels.impl.triton.decoding_parts import (
    Parts,
    accumulate,
    part_of_row,
    places,
    processors,
    seen_keys,
    store_part,
)
from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.tuning import launch_choice
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache

# Tiles of latents that are worth a program of their own: what it leaves for the join is as much.
_LEAST_TILES = 2


@triton.jit
def _apart(a, b):
    """A matrix product that no other is summed into: of two into one accumulator, one is lost on
    Blackwell (triton#10821). Float32 operands are not rounded on the way.
    """
    return tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32, max_num_imprecise_acc=a.shape[1])


@triton.jit(do_not_specialize=["seqlen_q", "capacity", "pages", "page_size", "splits", "left", "right"])
def _split_kernel(
    q1_pointer,
    q2_pointer,
    cache_pointer,
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
    q2_batch,
    q2_token,
    q2_head,
    cache_page,
    cache_token,
    table_batch,
    seqlen_q,
    capacity,
    pages,
    page_size,
    splits,
    left,
    right,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SIGNALS: tl.constexpr,
    NOISES: tl.constexpr,
    DV: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_ROTATED: tl.constexpr,
):
    heads: tl.constexpr = SIGNALS + NOISES
    tiles = tl.cdiv(seqlen_q * heads, BLOCK_M)
    tile = tl.program_id(0) % tiles  # a grid has 2^31 programs along its first axis
    split = tl.program_id(0) // tiles % splits
    z = (tl.program_id(0) // tiles // splits).to(tl.int64)
    first, last, end = part_of_row(
        z, split, splits, lengths_pointer, leftpad_pointer, seqlen_q, capacity, left, HAS_LEFT, BLOCK_N
    )

    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token, head = rows // heads, rows % heads
    present, is_noise = token < seqlen_q, head >= SIGNALS
    position = end - seqlen_q + token
    query_at = q1_pointer + z * q1_batch + token * q1_token + head * q1_head
    if NOISES > 0:
        noise_at = q2_pointer + z * q2_batch + token * q2_token + (head - SIGNALS) * q2_head
        # Two loads and a choice between them would be kept in registers, not in shared memory.
        query_at = tl.where(is_noise, noise_at, query_at)
    columns = tl.arange(0, BLOCK_DV)
    q = tl.load(query_at[:, None] + columns[None, :], mask=present[:, None] & (columns < DV)[None, :], other=0.0)
    if ROTATED > 0:
        turned = tl.arange(0, BLOCK_ROTATED)
        to_turned = present[:, None] & (turned < ROTATED)[None, :]
        q_rotated = tl.load(query_at[:, None] + DV + turned[None, :], mask=to_turned, other=0.0)
    o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m, l = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    for start in tl.range(first, last, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        held = keys < last
        page, slot = places(z, keys, held, table_pointer, table_batch, page_size, pages, BLOCK_N)
        at = (cache_pointer + page * cache_page + slot * cache_token)[:, None]
        c = tl.load(at + columns[None, :], mask=held[:, None] & (columns < DV)[None, :], other=0.0)
        s = _apart(q, tl.trans(c))
        if ROTATED > 0:
            rotated = tl.load(at + DV + turned[None, :], mask=held[:, None] & (turned < ROTATED)[None, :], other=0.0)
            s += _apart(q_rotated, tl.trans(rotated))
        seen = seen_keys(keys, held, position, present, left, right, HAS_LEFT, HAS_RIGHT)
        s = tl.where(seen, to_logits(s, SCALE, SOFTCAP), float("-inf"))
        o, m, l = accumulate(o, m, l, s, c)  # noqa: E741

    query = (z * splits + split) * seqlen_q + token
    at1 = query * SIGNALS + head
    store_part(o1_pointer, statistics1_pointer, at1, present & ~is_noise, o, m, l, DV, BLOCK_DV)
    if NOISES > 0:
        at2 = query * NOISES + head - SIGNALS
        store_part(o2_pointer, statistics2_pointer, at2, present & is_noise, o, m, l, DV, BLOCK_DV)


def attend(inputs: AttentionInputs, cache: Cache, options: AttentionOptions) -> Tensor:
    """The output (B, Sq, Hs, Dv) of :func:`motif_kernels.ops.decoding.attend`.

    k1 has one head, k2 is k1, and v is k1's first Dv columns.
    """
    q1, latents, q2, dv = inputs.q1, inputs.k1, inputs.q2, inputs.v.shape[3]
    batch, seqlen_q, signals, d = q1.shape
    rows, capacity = seqlen_q * (signals + inputs.noise_heads), cache.capacity(latents)
    kernel = "decoding_latent_float32" if q1.element_size() > 2 else "decoding_latent"
    choice = launch_choice(kernel, rows, q1.device)
    tiles = cdiv(rows, choice["block_m"])
    splits = cache.num_splits
    if splits is None:
        wanted = choice["programs"] * processors(q1.device) // max(1, batch * tiles)
        splits = max(1, min(wanted, capacity // (_LEAST_TILES * choice["block_n"])))
    parts = Parts(inputs, splits)
    launch(
        _split_kernel,
        (tiles * splits * batch,),
        q1,
        q2,
        latents,
        cache.lengths,
        cache.leftpad,
        cache.block_table,
        *parts.tensors,
        *q1.stride()[:3],
        *((0, 0, 0) if q2 is None else q2.stride()[:3]),
        *latents.stride()[:2],
        0 if cache.block_table is None else cache.block_table.stride(0),
        seqlen_q,
        capacity,
        len(latents),
        latents.shape[1],
        splits,
        options.left,
        options.right,
        SCALE=options.softmax_scale,
        SOFTCAP=options.softcap,
        HAS_LEFT=options.left >= 0,
        HAS_RIGHT=options.right >= 0,
        SIGNALS=signals,
        NOISES=inputs.noise_heads,
        DV=dv,
        ROTATED=d - dv,
        BLOCK_M=choice["block_m"],
        BLOCK_N=choice["block_n"],
        BLOCK_DV=max(16, next_power_of_2(dv)),
        BLOCK_ROTATED=max(16, next_power_of_2(d - dv)),
        num_warps=choice["num_warps"],
        num_stages=choice["num_stages"],
    )
    return parts.join(inputs, options)
