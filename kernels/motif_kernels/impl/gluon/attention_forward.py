"""Differential attention on Hopper, forward: what ``triton/attention_forward.py`` computes, by
warps that each do one thing.

A program serves 128 queries of one noise head and its signal heads, and then the next tile of
queries, until there are none. One warp brings queries, keys and values to shared memory by TMA. Two
warpgroups of 64 queries each multiply: the softmax of a tile of keys runs under the products with
the values of the tile before, and the two take turns at giving work to the tensor cores, so that
the softmax of one runs under the products of the other.

The noise head comes first. Its output waits in float32, in a scratch array of the program's own
that each thread reads where it wrote, for the signal heads of the group, whose difference is taken,
normed or gated, and rounded once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from motif_kernels.impl.gluon.attention_walk import INFINITY, ROWS, accumulator, attend
from motif_kernels.impl.gluon.tiles import (
    allocate_barriers,
    allocate_tiles,
    load_tile,
    matrix,
    sequence,
    tile_of_queries,
)
from motif_kernels.impl.triton.attention_tiles import LOG2_E, NUMBERS, document_tile, key_ranges

TILE = gl.constexpr(128)  # queries of a program's tile
PIECE = gl.constexpr(64)  # columns of values that the epilogue holds at once


@gluon.constexpr_function
def _coalesced():
    """Of a piece: 16 bytes a thread, 128 in a row."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def _of_a_warp():
    """Eight rows of a piece, likewise, for the producer's single warp."""
    return gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])


@gluon.jit
def _pieces(x):
    """Columns of an accumulator, PIECE at a time; nothing moves."""
    layout: gl.constexpr = accumulator(x.shape[1])
    if x.shape[1] == PIECE:
        return (gl.convert_layout(x, layout, assert_trivial=True),)
    else:
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _pieces(left) + _pieces(right)


# --- Tiles of queries -----------------------------------------------------------------------------


@gluon.jit
def _tile(turn, sequences, KEYS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Of the tile that a program serves in its turn: whether there is one, its number, noise head,
    batch entry and first query, where queries and keys lie, and the ranges of keys that it sees.
    """
    cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, tokens, key_tokens, documents = sequences[:7]
    left, right, blocks, noise_heads, batch, section = sequences[7:]
    block, pair, exists = tile_of_queries(turn, blocks, noise_heads * batch, section)
    n, z, first = pair % noise_heads, pair // noise_heads, block * TILE
    number = z * blocks + block
    if cu_seqlens_q is not None:
        z, first = document_tile(block, cu_seqlens_q, documents, tokens, TILE)
    queries_at = sequence(z, cu_seqlens_q, seqlen_q, tokens, documents, tokens)
    keys_at = sequence(z, cu_seqlens_k, seqlen_k, key_tokens, documents, 0)
    length_q, length_k = queries_at[3], keys_at[3]
    exists = exists & (first >= 0) & (first < length_q)
    last = gl.minimum(first + TILE, length_q) - 1
    begin, middle, middle_end, end = key_ranges(
        first, last, length_k - length_q, length_k, left, right, KEYS, HAS_LEFT, HAS_RIGHT
    )
    # At least one tile of keys, which the mask may hide.
    keys = (begin, middle, middle_end, gl.maximum(end, begin + 1))
    return exists, number, n, z, first, queries_at, keys_at, keys


@gluon.jit
def _turns(sequences):
    """How often a program has a turn."""
    blocks, noise_heads, batch = sequences[9], sequences[10], sequences[11]
    return gl.cdiv(blocks * noise_heads * batch, gl.num_programs(0))


# --- Consumers ------------------------------------------------------------------------------------


@gluon.jit
def _store(pointer, stride, first, length, x):
    """Round a piece and write its rows that lie before ``length``."""
    x = gl.convert_layout(x.to(pointer.dtype.element_ty), _coalesced())
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, _coalesced()))
    columns = gl.arange(0, PIECE, gl.SliceLayout(0, _coalesced()))
    gl.store(pointer + rows.to(gl.int64)[:, None] * stride + columns[None, :], x, mask=(rows < length)[:, None])


@gluon.jit
def _finish(
    parts,
    scratch,
    lam,
    weight_pointer,
    gate_pointer,
    out_pointer,
    a_pointer,
    inverse_rms_pointer,
    gate_token,
    stride,
    first,
    length,
    scaled,
    out_scale,
    NORM_EPS: gl.constexpr,
):
    """The difference with the noise output, the epilogue, and the one rounding, piece by piece."""
    PIECES: gl.constexpr = len(parts)
    layout: gl.constexpr = accumulator(PIECE)
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, PIECE, gl.SliceLayout(0, layout))
    differences = ()
    square = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, layout))
    for j in gl.static_range(PIECES):
        a = parts[j]
        if scratch is not None:
            a -= lam[:, None] * gl.load(scratch + j * PIECE)
        if a_pointer is not None:
            _store(a_pointer + j * PIECE, stride, first, length, a)
        square += gl.sum(a * a, 1)
        differences = differences + (a,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no stars
    inverse_rms = gl.rsqrt(square / (PIECES * PIECE) + NORM_EPS)
    if inverse_rms_pointer is not None:
        gl.store(inverse_rms_pointer + rows, inverse_rms, mask=rows < length)
    for j in gl.static_range(PIECES):
        a = differences[j]
        if weight_pointer is not None:
            weight = gl.load(weight_pointer + j * PIECE + columns).to(gl.float32)
            a *= inverse_rms[:, None] * weight[None, :]
        if gate_pointer is not None:
            at = gate_pointer + rows.to(gl.int64)[:, None] * gate_token + (j * PIECE + columns)[None, :]
            gate = gl.load(at, mask=(rows < scaled)[:, None], other=0.0).to(gl.float32)
            a *= 1 / (1 + gl.exp2(gate * -LOG2_E))
        _store(out_pointer + j * PIECE, stride, first, length, a * out_scale)


@gluon.jit
def _consume(
    PART: gl.constexpr,
    shared,
    turns,
    arrays,
    strides,
    sequences,
    out_scale,
    NORM_EPS: gl.constexpr,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_NOISE: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention and epilogue for half of each tile's queries."""
    q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty = shared
    lam_pointer, weight_pointer, gate_pointer, out_pointer, a_pointer, scratch_pointer, o2_pointer = arrays[:7]
    lse1_pointer, lse2_pointer, inverse_rms_pointer, max1_pointer, max2_pointer = arrays[7:]
    lam_batch, lam_token, lam_head, gate_batch, gate_token, gate_head = strides
    left, right, noise_heads, tokens = sequences[7], sequences[8], sequences[10], sequences[4]
    KEYS: gl.constexpr = k_tiles.shape[2]
    DV: gl.constexpr = v_tiles.shape[4]
    outputs: gl.constexpr = accumulator(DV)
    piece: gl.constexpr = accumulator(PIECE)
    heads = noise_heads * GROUP
    own_rows = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, piece))
    scratch = scratch_pointer
    if HAS_NOISE:
        columns = gl.arange(0, PIECE, gl.SliceLayout(0, piece))
        scratch += (gl.program_id(0) * TILE + own_rows)[:, None] * DV + columns[None, :]
    step = 0
    maps = 0
    for turn in range(_turns(sequences)):
        exists, number, n, z, first, queries_at, keys_at, keys = _tile(turn, sequences, KEYS, HAS_LEFT, HAS_RIGHT)
        if exists:
            row_q, token, length_q, length_k = queries_at[1], queries_at[2], queries_at[3], keys_at[3]
            queries = first + PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, accumulator(KEYS)))
            present = queries < length_q
            positions, bounds = queries + (length_k - length_q), (length_k, left, right)
            # Without keys, what lambda and gate hold is not read: zeros stay zeros even by NaN.
            scaled = length_q if length_k > 0 else 0
            noise, entry = n.to(gl.int64), z.to(gl.int64)  # addresses may be beyond 32 bits
            for i in range(0 if HAS_NOISE else 1, GROUP + 1):
                h = noise * GROUP + i - 1
                slot = maps % 2 * 2 + PART
                mbarrier.wait(q_ready.index(slot), maps // 2 & 1)
                o, m, l, step = attend(  # noqa: E741
                    matrix(q_tiles.index(slot)), k_tiles, v_tiles, ready, empty, turns, step, keys, positions, bounds,
                    PART, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, STAGES,
                )  # fmt: skip
                mbarrier.arrive(q_empty.index(slot), count=1)
                maps += 1
                fully_masked = l == 0
                if lse1_pointer is not None:
                    # Infinite in a fully masked row: every probability that the backward pass
                    # recomputes is then 0.
                    # Rows past the last may be NaN, for which log2 branches within a warp.
                    lse = gl.where(fully_masked, INFINITY, m + gl.log2(gl.where(present, l, 1.0)))
                    lse_at = lse1_pointer + h * tokens
                    if HAS_NOISE:
                        lse_at = lse2_pointer + noise * tokens if i == 0 else lse_at
                    gl.store(lse_at + token + queries, lse, mask=present)
                if max1_pointer is not None:
                    row = number.to(gl.int64) * 2 + PART
                    max_at = max1_pointer + row * heads + h
                    if HAS_NOISE:
                        max_at = max2_pointer + row * noise_heads + noise if i == 0 else max_at
                    gl.store(max_at, gl.max(gl.where(present, m, -INFINITY), 0))
                o *= gl.convert_layout(gl.where(fully_masked, 0.0, 1 / l), gl.SliceLayout(1, outputs))[:, None]
                parts = _pieces(o)
                if HAS_NOISE and i == 0:
                    for j in gl.static_range(DV // PIECE):
                        gl.store(scratch + j * PIECE, parts[j])
                        if o2_pointer is not None:
                            o2_at = o2_pointer + (token * noise_heads + noise) * DV + j * PIECE
                            _store(o2_at, noise_heads * DV, first + PART * ROWS, length_q, parts[j])
                else:
                    lam = 0.0
                    if HAS_NOISE:
                        rows = first + own_rows
                        lam_at = (
                            lam_pointer + entry * lam_batch + h * lam_head + (row_q + rows).to(gl.int64) * lam_token
                        )
                        lam = gl.load(lam_at, mask=rows < scaled, other=0.0).to(gl.float32)
                    gate_at = gate_pointer
                    if gate_pointer is not None:
                        gate_at += entry * gate_batch + row_q.to(gl.int64) * gate_token + h * gate_head
                    own = (token * heads + h) * DV
                    a_at = a_pointer
                    if a_pointer is not None:
                        a_at += own
                    inverse_rms_at = inverse_rms_pointer
                    if inverse_rms_pointer is not None:
                        inverse_rms_at += h * tokens + token
                    _finish(
                        parts, scratch, lam, weight_pointer, gate_at, out_pointer + own, a_at, inverse_rms_at,
                        gate_token, heads * DV, first + PART * ROWS, length_q, scaled, out_scale, NORM_EPS,
                    )  # fmt: skip


# --- Producer -------------------------------------------------------------------------------------


@gluon.jit
def _load(signal, noise, z, row, signal_head, noise_head, i, ready, tile):
    """Start bringing a tile of the i-th signal map or, for 0, of the noise map."""
    if noise is None:
        load_tile(signal, z, row, signal_head, ready, tile)
    elif i == 0:
        load_tile(noise, z, row, noise_head, ready, tile)
    else:
        load_tile(signal, z, row, signal_head, ready, tile)


@gluon.jit
def _clear_rows(tile, valid):
    """Zeros from row ``valid`` on of a tile in shared memory."""
    HEIGHT: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    rows = gl.arange(0, 8, gl.SliceLayout(1, _of_a_warp()))
    for first in gl.static_range(0, HEIGHT, 8):
        if first + 8 > valid:
            for column in gl.static_range(0, WIDTH, PIECE):
                part = tile.slice(first, 8, 0).slice(column, PIECE, 1)
                part.store(gl.where((first + rows < valid)[:, None], part.load(_of_a_warp()), 0.0))


@gluon.jit
def _produce(
    q1,
    k1,
    q2,
    k2,
    v,
    shared,
    landed,
    sequences,
    PACKED: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_NOISE: gl.constexpr,
    GROUP: gl.constexpr,
    SIGNALS_PER_K1: gl.constexpr,
    NOISES_PER_K2: gl.constexpr,
    NOISES_PER_V: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Brings what the consumers multiply, as far ahead as shared memory has room."""
    q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty = shared
    KEYS: gl.constexpr = k_tiles.shape[2]
    K_BYTES: gl.constexpr = k1.block_type.nbytes
    V_BYTES: gl.constexpr = v.block_type.nbytes
    step = 0
    maps = 0
    cleared = 0
    for turn in range(_turns(sequences)):
        exists, _number, n, _z, first, queries_at, keys_at, keys = _tile(turn, sequences, KEYS, HAS_LEFT, HAS_RIGHT)
        if exists:
            for i in range(0 if HAS_NOISE else 1, GROUP + 1):
                for part in gl.static_range(2):
                    slot, row = maps % 2 * 2 + part, queries_at[1] + first + part * ROWS
                    mbarrier.wait(q_empty.index(slot), maps // 2 & 1 ^ 1)
                    mbarrier.expect(q_ready.index(slot), q1.block_type.nbytes)
                    _load(q1, q2, queries_at[0], row, n * GROUP + i - 1, n, i, q_ready.index(slot), q_tiles.index(slot))
                maps += 1
                for start in range(keys[0], keys[3], KEYS):
                    stage, row = step % STAGES, keys_at[1] + start
                    barrier, v_tile = ready.index(stage), v_tiles.index(stage)
                    mbarrier.wait(empty.index(stage), step // STAGES & 1 ^ 1)
                    cut = False
                    if PACKED:
                        cut = start + KEYS > keys_at[3]
                    if cut:  # other documents follow, or NaN that a probability of 0 would not hide
                        mbarrier.expect(landed.index(0), V_BYTES)
                        load_tile(v, keys_at[0], row, n // NOISES_PER_V, landed.index(0), v_tile)
                        mbarrier.wait(landed.index(0), cleared & 1)
                        cleared += 1
                        _clear_rows(matrix(v_tile), keys_at[3] - start)
                        fence_async_shared()
                        mbarrier.expect(barrier, K_BYTES)
                    else:
                        mbarrier.expect(barrier, K_BYTES + V_BYTES)
                        load_tile(v, keys_at[0], row, n // NOISES_PER_V, barrier, v_tile)
                    _load(
                        k1, k2, keys_at[0], row, n * GROUP // SIGNALS_PER_K1, n // NOISES_PER_K2, i,
                        barrier, k_tiles.index(stage),
                    )  # fmt: skip
                    step += 1


@gluon.jit(do_not_specialize=[*NUMBERS, "blocks", "batch", "section"])
def _forward_kernel(
    q1,
    k1,
    q2,
    k2,
    v,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    cu_seqlens_q_pointer,
    cu_seqlens_k_pointer,
    out_pointer,
    a_pointer,
    scratch_pointer,
    o2_pointer,
    lse1_pointer,
    lse2_pointer,
    inverse_rms_pointer,
    max1_pointer,
    max2_pointer,
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
    blocks,
    noise_heads,
    batch,
    section,
    out_scale,
    NORM_EPS: gl.constexpr,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_NOISE: gl.constexpr,
    GROUP: gl.constexpr,
    SIGNALS_PER_K1: gl.constexpr,
    NOISES_PER_K2: gl.constexpr,
    NOISES_PER_V: gl.constexpr,
    STAGES: gl.constexpr,
):
    q_tiles, k_tiles, v_tiles = allocate_tiles(q1, 4), allocate_tiles(k1, STAGES), allocate_tiles(v, STAGES)
    q_ready, q_empty = allocate_barriers(4, 1), allocate_barriers(4, 1)
    ready, empty = allocate_barriers(STAGES, 1), allocate_barriers(STAGES, 2)
    turns, landed = allocate_barriers(2, 1), allocate_barriers(1, 1)
    fence_async_shared()
    shared = (q_tiles, k_tiles, v_tiles, q_ready, q_empty, ready, empty)
    arrays = (
        lam_pointer, weight_pointer, gate_pointer, out_pointer, a_pointer, scratch_pointer, o2_pointer,
        lse1_pointer, lse2_pointer, inverse_rms_pointer, max1_pointer, max2_pointer,
    )  # fmt: skip
    strides = (lam_batch, lam_token, lam_head, gate_batch, gate_token, gate_head)
    sequences = (
        cu_seqlens_q_pointer, cu_seqlens_k_pointer, seqlen_q, seqlen_k, tokens, key_tokens, documents,
        left, right, blocks, noise_heads, batch, section,
    )  # fmt: skip
    first: gl.constexpr = 0
    second: gl.constexpr = 1
    # Registers of a thread: what clears rows takes more than what asks for copies.
    PACKED: gl.constexpr = cu_seqlens_k_pointer is not None
    CONSUMER: gl.constexpr = 232 if PACKED else 240
    PRODUCER: gl.constexpr = 40 if PACKED else 24
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    first, shared, turns, arrays, strides, sequences, out_scale,
                    NORM_EPS, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_NOISE, GROUP, STAGES,
                ),
            ),
            (
                _consume,
                (
                    second, shared, turns, arrays, strides, sequences, out_scale,
                    NORM_EPS, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT, HAS_NOISE, GROUP, STAGES,
                ),
            ),
            (
                _produce,
                (
                    q1, k1, q2, k2, v, shared, landed, sequences, PACKED,
                    HAS_LEFT, HAS_RIGHT, HAS_NOISE, GROUP, SIGNALS_PER_K1, NOISES_PER_K2, NOISES_PER_V, STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip
