"""Softmax attention's backward for Hopper in one pass: gradients of queries, keys and values.

A program serves 128 keys of one key and value head and walks over the tiles of queries of all the
heads that share it. Maps are (keys, queries), so that P^T and dS^T come from registers where
dV = P^T dO and dK = dS^T Q are summed; dQ = dS K is added to float32 in global memory. One warp
brings tiles by TMA, one sees to the order of dQ, and two warpgroups of 64 keys each multiply.

The two maps of differential attention are two launches: the noise map's output has the gradient
dO2 (``impl/triton/attention_backward.py``). Values of 256 columns are summed in two sweeps over the
queries, 128 columns at a time: registers do not hold the gradients of all of them beside dK. The
second computes P again, which costs an eighth more.

Order: the tiles of keys that see a tile of queries add to its dQ from the first to the last, each
waiting until a semaphore says that its predecessor has added. Sums are then the same, bit for bit,
in every run. Nothing waits forever: a program takes its tile by a ticket, tiles of earlier keys
have earlier tickets, and a program waits for earlier tickets alone, whose programs have started and
need nothing of it. Programs start on tiles of early keys, which under a causal mask have the
longest walks, and walk from the last queries to the first: so each finds that its predecessor, one
step ahead, has just left.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from motif_kernels.impl.gluon.tiles import allocate_barriers, allocate_tiles, load_tile, matrix, sequence
from motif_kernels.impl.triton.attention_tiles import document, document_tile

ROWS = gl.constexpr(64)  # queries of a tile, and keys of a warpgroup
KEYS = gl.constexpr(128)  # of a program
LOG2_E = gl.constexpr(1.4426950408889634)
ROWS_TL = tl.constexpr(64)


@triton.jit
def _query_tile(cu_seqlens_pointer, seqlen, tokens, documents):
    """Of this program's tile of queries: its number, its first row and its first token; and the
    length of its sequence.
    """
    if cu_seqlens_pointer is not None:
        z, first = document_tile(tl.program_id(0), cu_seqlens_pointer, documents, tokens, ROWS_TL)
    else:
        z, first = tl.program_id(2), tl.program_id(0) * ROWS_TL
    _, token, length = document(z, cu_seqlens_pointer, seqlen, tokens, documents, tokens)
    return token // ROWS_TL + z + first // ROWS_TL, first, token, length


@triton.jit(do_not_specialize=["seqlen", "tokens", "documents"])
def _gather_rows_kernel(lse_pointer, delta_pointer, cu_seqlens_pointer, rows_pointer, seqlen, tokens, documents):
    """Minus the log-sum-exps and D of a tile of queries, side by side for TMA; minus infinity, for
    which there are no probabilities, past the last.
    """
    h = tl.program_id(1).to(tl.int64)
    tile, first, token, length = _query_tile(cu_seqlens_pointer, seqlen, tokens, documents)
    rows = first + tl.arange(0, ROWS_TL)
    present = rows < length
    if first < length:
        lse = tl.load(lse_pointer + h * tokens + token + rows, mask=present, other=float("inf"))
        delta = tl.load(delta_pointer + h * tokens + token + rows, mask=present, other=0.0)
        at = rows_pointer + (tile * tl.num_programs(1) + h) * 2 * ROWS_TL + tl.arange(0, ROWS_TL)
        tl.store(at, -lse)
        tl.store(at + ROWS_TL, delta)


@triton.jit(do_not_specialize=["seqlen", "tokens", "documents"])
def _round_kernel(
    sum_pointer,
    cu_seqlens_pointer,
    dq_pointer,
    seqlen,
    tokens,
    documents,
    tiles,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
):
    """Gradient dQ (tokens, heads, D) from its float32 sums, which lie as ``_add`` leaves them."""
    h = tl.program_id(1).to(tl.int64)
    tile, first, token, length = _query_tile(cu_seqlens_pointer, seqlen, tokens, documents)
    rows, columns = tl.arange(0, ROWS_TL)[:, None], tl.arange(0, D)[None, :]
    # Halves of the columns, each (halves of 16 rows, blocks of 8 columns, rows, columns).
    part, column = columns // (D // 2), columns % (D // 2)
    block = (part * 2 + rows // 8 % 2) * (D // 16) + column // 8
    at = (block * 32 + rows // 16 * 8 + rows % 8) * 8 + column % 8
    if first < length:
        sums = sum_pointer + ((h // GROUP * tiles + tile) * GROUP + h % GROUP) * ROWS_TL * D
        dq = tl.load(sums + at) * SCALE
        to = dq_pointer + ((token + first + rows) * tl.num_programs(1) + h) * D + columns
        tl.store(to, dq.to(dq_pointer.dtype.element_ty), mask=first + rows < length)


@gluon.jit
def _step(t, steps, first_tile, GROUP: gl.constexpr):
    """Of step t: its tile of queries, the last first, and which of the heads that share keys."""
    return first_tile + (steps - 1 - t) // GROUP, t % GROUP


@gluon.jit
def _bring(q, k, v, d_o, rows, tiles, barriers, place, GROUP: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr):
    """The warp that brings tiles."""
    q_tiles, k_tiles, v_tiles, d_o_tiles, row_tiles, _ = tiles
    keys_are_there, is_there, is_free, _, _, _, _ = barriers
    z, q_row, k_row, row_tile, head, heads, k_head, v_head, first_tile, steps = place
    COLUMNS: gl.constexpr = v_tiles.shape[4]
    if steps > 0:
        bar = keys_are_there.index(0)
        mbarrier.expect(bar, 2 * k.block_type.nbytes + 2 * PIECES * v.block_type.nbytes)
        for i in gl.static_range(2):
            load_tile(k, z, k_row + i * ROWS, k_head, bar, k_tiles.index(i))
            for j in gl.static_range(PIECES):
                load_tile(v, z, k_row + i * ROWS, v_head, bar, v_tiles.index(i * PIECES + j), j * COLUMNS)
    for sweep in gl.static_range(PIECES):
        for t in range(steps):
            i, h = _step(t, steps, first_tile, GROUP)
            turn = sweep * steps + t
            b = turn % STAGES
            mbarrier.wait(is_free.index(b), (turn // STAGES + 1) & 1)
            bar = is_there.index(b)
            mbarrier.expect(
                bar,
                q.block_type.nbytes + (1 if sweep > 0 else PIECES) * d_o.block_type.nbytes + 2 * rows.block_type.nbytes,
            )
            load_tile(q, z, q_row + i * ROWS, head + h, bar, q_tiles.index(b))
            for j in gl.static_range(sweep, PIECES):
                load_tile(d_o, z, q_row + i * ROWS, head + h, bar, d_o_tiles.index(b * PIECES + j), j * COLUMNS)
            for j in gl.static_range(2):
                at = ((row_tile + i) * heads + head + h) * 2 + j
                tma.async_copy_global_to_shared(rows, [at, 0], bar, row_tiles.index(b * 2 + j))


@gluon.jit
def _see_to_order(semaphores, barriers, place, key_tile, first_seen, HAS_LEFT: gl.constexpr, GROUP: gl.constexpr):
    """The warp that waits for predecessors, lets the warpgroups add, and tells successors. It is
    one step ahead, so that they need not wait for global memory.

    ``first_seen`` is the first key that the sequence's first query sees.
    """
    _, _, _, _, _, may_add, have_added = barriers
    _, _, _, row_tile, head, heads, _, _, first_tile, steps = place
    for t in range(steps + 1):
        if t < steps:
            i, h = _step(t, steps, first_tile, GROUP)
            predecessors = key_tile
            if HAS_LEFT:
                predecessors -= gl.maximum(i * ROWS + first_seen, 0) // KEYS
            semaphore = semaphores + (row_tile + i) * heads + head + h
            while gl.atomic_add(semaphore, 0, sem="acquire", scope="gpu") < predecessors:
                pass
            mbarrier.arrive(may_add.index(t % 2), count=1)
        if t > 0:
            i, h = _step(t - 1, steps, first_tile, GROUP)
            mbarrier.wait(have_added.index((t - 1) % 2), ((t - 1) // 2) & 1)
            gl.atomic_add(semaphores + (row_tile + i) * heads + head + h, 1, sem="release", scope="gpu")


@gluon.jit
def _probabilities(
    s,
    minus_lse,
    i,
    keys,
    limits,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):
    """exp2(s - lse), 0 where hidden, and the logits' slope if they are capped. Tile of queries i is
    counted from the first that sees a key of the program's, as ``limits`` are (see the kernel).
    """
    present, leftmost, rightmost, whole_begin, whole_end = limits
    slope = 1.0
    if SOFTCAP > 0:
        s = 1 - 2 / (1 + gl.exp2(s * (2 * LOG2_E * SCALE / SOFTCAP)))
        slope = 1 - s * s
        p = gl.exp2(gl.fma(s, SOFTCAP * LOG2_E, minus_lse))
    else:
        p = gl.exp2(gl.fma(s, SCALE * LOG2_E, minus_lse))
    cut = i < whole_begin
    if HAS_LEFT:
        cut = cut | (i >= whole_end)
    if cut:
        # Of a query's number a thread's place is bits 1 and 2, the same in all that it holds: what
        # is compared is then a constant with one number a key.
        query = gl.arange(0, ROWS, gl.SliceLayout(0, p.type.layout))[None, :]
        place, constant = query & 6, query & ~6
        first = gl.full_like(keys, 0)
        if HAS_RIGHT:
            first = keys - (i * ROWS + rightmost)
        first = gl.where(keys < present, first, ROWS)
        seen = constant >= first[:, None] - place
        if HAS_LEFT:
            seen = seen & (constant <= (keys - (i * ROWS + leftmost))[:, None] - place)
        p = gl.where(seen, p, 0.0)
    return p, slope


@gluon.jit
def _add(d_q, pointer, COLUMNS: gl.constexpr):
    """Add a tile (ROWS, COLUMNS) to its sum, which lies in the order of registers and threads: a
    warp then adds to whole lines, at addresses that differ by constants.
    """
    flat = d_q.reshape([4, 2, 8, COLUMNS // 8, 8]).permute([1, 3, 0, 2, 4]).reshape([ROWS * COLUMNS])
    gl.atomic_add(pointer + gl.arange(0, ROWS * COLUMNS, flat.type.layout), flat, sem="relaxed", scope="gpu")


@gluon.jit
def _store(pointer, base, tile, first, end, heads, scale, column, WIDTH: gl.constexpr):
    """Rows of a gradient (tokens, heads, WIDTH) from ``column`` on; added to ``base``, if any."""
    rows = first + gl.arange(0, ROWS, gl.SliceLayout(1, tile.type.layout))
    columns = column + gl.arange(0, tile.shape[1], gl.SliceLayout(0, tile.type.layout))
    at = rows.to(gl.int64)[:, None] * (heads * WIDTH) + columns[None, :]
    present = (rows < end)[:, None]
    tile *= scale
    if base is not None:
        tile += gl.load(base + at, mask=present, other=0.0)
    gl.store(pointer + at, tile.to(pointer.dtype.element_ty), mask=present)


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    tiles,
    barriers,
    steps,
    limits,
    dq,
    dk,
    dv,
    dv_base,
    parts,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """A warpgroup with keys PART * 64 to PART * 64 + 63 of the program's."""
    q_tiles, k_tiles, v_tiles, d_o_tiles, row_tiles, d_s_tiles = tiles
    keys_are_there, is_there, is_free, d_s_is_there, d_s_is_free, may_add, have_added = barriers
    COLUMNS: gl.constexpr = v_tiles.shape[4]  # of values, in a sweep
    D: gl.constexpr = q_tiles.shape[4]
    dtype: gl.constexpr = q_tiles.dtype
    maps: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 16])
    of_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    of_v: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    of_q: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D // 2, 16])
    keys = PART * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, maps))
    if steps > 0:
        mbarrier.wait(keys_are_there.index(0), 0)
    for sweep in gl.static_range(PIECES):
        d_v = gl.zeros([ROWS, COLUMNS], gl.float32, of_v)
        if sweep == 0:
            d_k = gl.zeros([ROWS, D], gl.float32, of_k)
        for t in range(steps):
            i, h = _step(t, steps, 0, GROUP)
            turn = sweep * steps + t
            b = turn % STAGES
            # 0, but the compiler does not know: it would compute the matrix descriptors of keys and
            # values before the loop and hold each in two registers.
            own = PART + (t >> 30)
            k = matrix(k_tiles.index(own))
            zeros = gl.zeros([ROWS, ROWS], gl.float32, maps)
            mbarrier.wait(is_there.index(b), (turn // STAGES) & 1)
            q = matrix(q_tiles.index(b))
            d_o = matrix(d_o_tiles.index(b * PIECES + sweep))
            s = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if sweep == 0:
                d_p = zeros
                for j in gl.static_range(PIECES):
                    v = matrix(v_tiles.index(own * PIECES + j))
                    d_o_piece = matrix(d_o_tiles.index(b * PIECES + j))
                    d_p = warpgroup_mma(v, d_o_piece.permute((1, 0)), d_p, use_acc=j > 0, is_async=True)
                s = warpgroup_mma_wait(PIECES, (s,))
            else:
                s = warpgroup_mma_wait(0, (s,))
            minus_lse = row_tiles.index(b * 2).load(maps)
            p, slope = _probabilities(s, minus_lse, i, keys, limits, SCALE, SOFTCAP, HAS_LEFT, HAS_RIGHT)
            if sweep > 0:
                rounded = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, of_v, k_width=2))
                d_v = warpgroup_mma(rounded, d_o, d_v, is_async=True)
                d_v = warpgroup_mma_wait(0, (d_v,))
                mbarrier.arrive(is_free.index(b), count=1)
            else:
                d_p = warpgroup_mma_wait(0, (d_p,))
                d_s = p * (d_p - row_tiles.index(b * 2 + 1).load(maps))
                if SOFTCAP > 0:
                    d_s *= slope
                d_s = d_s.to(dtype)
                rounded = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, of_v, k_width=2))
                d_v = warpgroup_mma(rounded, d_o, d_v, is_async=True)
                # The other warpgroup has read the last one.
                mbarrier.wait(d_s_is_free.index(0), (t + 1) & 1)
                d_s_tiles.index(own).store(d_s)
                d_s = gl.convert_layout(d_s, gl.DotOperandLayout(0, of_k, k_width=2))
                d_k = warpgroup_mma(d_s, q, d_k, is_async=True)
                fence_async_shared()
                mbarrier.arrive(d_s_is_there.index(0), count=1)
                mbarrier.wait(d_s_is_there.index(0), t & 1)
                # Half of the columns of dQ, from all keys.
                d_q = gl.zeros([ROWS, D // 2], gl.float32, of_q)
                for j in gl.static_range(2):
                    of_tile = j + (t >> 30)
                    half = matrix(k_tiles.index(of_tile)).slice(PART * (D // 2), D // 2, 1)
                    d_s_part = d_s_tiles.index(of_tile).permute((1, 0))
                    d_q = warpgroup_mma(d_s_part, half, d_q, use_acc=j > 0, is_async=True)
                d_q, d_k, d_v = warpgroup_mma_wait(0, (d_q, d_k, d_v))
                mbarrier.arrive(is_free.index(b), count=1)
                mbarrier.arrive(d_s_is_free.index(0), count=1)
                mbarrier.wait(may_add.index(t % 2), (t // 2) & 1)
                _add(d_q, dq + (i * GROUP + h).to(gl.int64) * (D * ROWS) + PART * (D // 2) * ROWS, D // 2)
                mbarrier.arrive(have_added.index(t % 2), count=1)
        present, _, _, _, _ = limits
        if sweep == 0:
            _store(dk, None, d_k, PART * ROWS, present, parts, SCALE, 0, D)
        _store(dv, dv_base, d_v, PART * ROWS, present, parts, 1.0, sweep * COLUMNS, PIECES * COLUMNS)


@gluon.jit(do_not_specialize=["seqlen_q", "seqlen_k", "tokens", "key_tokens", "documents", "left", "right"])
def _backward_kernel(
    q,
    k,
    v,
    d_o,
    rows,
    cu_seqlens_q,
    cu_seqlens_k,
    tickets,
    dq,
    dk,
    dv,
    dv_base,
    seqlen_q,
    seqlen_k,
    tokens,
    key_tokens,
    documents,
    left,
    right,
    parts,
    tiles_of_queries,
    batch,
    SCALE: gl.constexpr,
    SOFTCAP: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS_PER_K: gl.constexpr,
    HEADS_PER_V: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
):
    """Gradients dK and dV (tokens, parts, width) of GROUP heads each; dQ is added to.

    ``tickets`` holds how many programs have started, then a semaphore for each tile of queries and
    head; ``dq`` is float32 (parts, tiles of queries, GROUP, ...), each tile as ``_add`` leaves it;
    ``dv_base`` is what dV is added to, such as the other map's.
    """
    ticket = gl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")
    part = ticket % parts
    if cu_seqlens_k is not None:
        z, first_key = document_tile(ticket // parts, cu_seqlens_k, documents, key_tokens, KEYS)
    else:
        z = ticket // parts % batch
        first_key = ticket // (parts * batch) * KEYS
    entry, q_row, token, length_q = sequence(z, cu_seqlens_q, seqlen_q, tokens, documents, 0)
    _, k_row, key_token, length_k = sequence(z, cu_seqlens_k, seqlen_k, key_tokens, documents, key_tokens)
    shift = length_k - length_q
    begin, end, whole_begin, whole_end = 0, length_q, 0, length_q
    last_key = first_key + KEYS - 1
    if HAS_RIGHT:
        begin = gl.maximum(first_key - shift - right, 0)
        whole_begin = gl.maximum(last_key - shift - right, 0)
    if HAS_LEFT:
        end = gl.minimum(length_q, last_key - shift + left + 1)
        whole_end = first_key - shift + left + 1
    whole_begin = gl.where(last_key < length_k, whole_begin, length_q)
    first_tile = begin // ROWS
    steps = gl.where(first_key < length_k, gl.maximum(gl.cdiv(end, ROWS) - first_tile, 0), 0) * GROUP
    row_tile = (token // ROWS).to(gl.int32) + z
    head = part * GROUP
    heads = parts * GROUP

    q_tiles = allocate_tiles(q, STAGES)
    k_tiles = allocate_tiles(k, 2)
    v_tiles = allocate_tiles(v, 2 * PIECES)
    d_o_tiles = allocate_tiles(d_o, STAGES * PIECES)
    row_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, ROWS], rows.layout)
    layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    d_s_tiles = gl.allocate_shared_memory(q.dtype, [2, ROWS, ROWS], layout)
    tiles = (q_tiles, k_tiles, v_tiles, d_o_tiles, row_tiles, d_s_tiles)
    keys_are_there = allocate_barriers(1, 1)
    is_there = allocate_barriers(STAGES, 1)
    is_free = allocate_barriers(STAGES, 2)
    d_s_is_there = allocate_barriers(1, 2)
    d_s_is_free = allocate_barriers(1, 2)
    may_add = allocate_barriers(2, 1)
    have_added = allocate_barriers(2, 2)
    barriers = (keys_are_there, is_there, is_free, d_s_is_there, d_s_is_free, may_add, have_added)
    fence_async_shared()

    k_head, v_head = head // HEADS_PER_K, head // HEADS_PER_V
    place = (entry, q_row, k_row + first_key, row_tile, head, heads, k_head, v_head, first_tile, steps)
    # Relative to the first key and the first query that are served: how many keys there are, what a
    # query sees first and last, and the tiles of queries that see all keys.
    ahead = first_tile * ROWS + shift - first_key
    whole_begin, whole_end = gl.cdiv(whole_begin, ROWS) - first_tile, gl.maximum(whole_end, 0) // ROWS - first_tile
    limits = (length_k - first_key, ahead - left, ahead + right, whole_begin, whole_end)
    D: gl.constexpr = q.block_type.shape[3]
    dq += (part.to(gl.int64) * tiles_of_queries + row_tile + first_tile) * (GROUP * ROWS * D)
    dk += ((key_token + first_key) * parts + part) * D
    dv += ((key_token + first_key) * parts + part) * (PIECES * v.block_type.shape[3])
    if dv_base is not None:
        dv_base += ((key_token + first_key) * parts + part) * (PIECES * v.block_type.shape[3])
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    zero,
                    tiles,
                    barriers,
                    steps,
                    limits,
                    dq,
                    dk,
                    dv,
                    dv_base,
                    parts,
                    SCALE,
                    SOFTCAP,
                    HAS_LEFT,
                    HAS_RIGHT,
                    GROUP,
                    STAGES,
                    PIECES,
                ),
            ),
            (
                _multiply,
                (
                    one,
                    tiles,
                    barriers,
                    steps,
                    limits,
                    dq,
                    dk,
                    dv,
                    dv_base,
                    parts,
                    SCALE,
                    SOFTCAP,
                    HAS_LEFT,
                    HAS_RIGHT,
                    GROUP,
                    STAGES,
                    PIECES,
                ),
            ),
            (_bring, (q, k, v, d_o, rows, tiles, barriers, place, GROUP, STAGES, PIECES)),
            (_see_to_order, (tickets + 1, barriers, place, first_key // KEYS, shift - left, HAS_LEFT, GROUP)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
