"""What the attention kernels share: tiles of heads in memory, which keys a tile of queries sees,
and logits.

Legend: B batch or documents, S tokens, D head_dim of queries and keys, Dv of values, Hs signal
heads, Hn noise heads, g = Hs / Hn (GROUP). Logits are kept in units of log2, so that every
exponential is an exp2.

Tiles of queries and keys are tuples of parts side by side, (rows, BLOCK_D) each. There is one part,
but where D is three times a power of two: padding 192 to 256 would be a third more work and memory.
"""

import triton
import triton.language as tl

# Arguments that change from call to call: no kernel is compiled for their values.
NUMBERS = ["seqlen_q", "seqlen_k", "tokens", "key_tokens", "documents", "left", "right", "lam_batch"]
FAR = tl.constexpr(1 << 30)  # the row where descriptors of packed tokens end
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _addresses(pointer, stride, first, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    # The tile's corner in 64 bits, the way from there in the stride's own: in a loop only the
    # corner changes.
    corner = pointer + (tl.full((), 0, tl.int64) + first) * stride
    return corner + tl.arange(0, BLOCK_ROWS)[:, None] * stride + tl.arange(0, BLOCK_WIDTH)[None, :]


@triton.jit
def load_tile(
    pointer,
    stride,
    first,
    row_end,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A head's rows from ``first`` on, (BLOCK_ROWS, BLOCK_WIDTH): 0 past its width and, if MASKED,
    from row_end on.
    """
    at = _addresses(pointer, stride, first, BLOCK_ROWS, BLOCK_WIDTH)
    columns = tl.arange(0, BLOCK_WIDTH)
    if MASKED:
        present = (first + tl.arange(0, BLOCK_ROWS) < row_end)[:, None]
        if WIDTH >= BLOCK_WIDTH:
            return tl.load(at, mask=present, other=0.0)
        return tl.load(at, mask=present & (columns < WIDTH)[None, :], other=0.0)
    if WIDTH >= BLOCK_WIDTH:
        return tl.load(at)
    return tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)


@triton.jit
def described_rows(z, start, length, PACKED: tl.constexpr):
    """Where the launch's tensor descriptors (``descriptors.py``) have the rows of batch entry z, or
    of the packed document at ``start``: the first two coordinates, and that of row 0.
    """
    outer, inner, row = 0, z.to(tl.int32), 0
    if PACKED:
        # Triton's interpreter would make FAR - length a constant whose value is a tensor.
        outer, inner, row = FAR, (start + length).to(tl.int32), tl.sub(FAR, length)
    return outer, inner, row


@triton.jit
def rows_of(x, stride, head, outer, inner, row, DESCRIBED: tl.constexpr):
    """A head's rows, for :func:`load_rows` and :func:`store_rows`: a pointer to its first and the
    stride between them; or a descriptor, the head, and what :func:`described_rows` gives.
    """
    if DESCRIBED:
        return x, head.to(tl.int32), outer, inner, row
    else:  # without it, Triton would compile both
        return x, stride


@triton.jit
def head_rows(x, h, z, start, length, batch, token, head, DESCRIBED: tl.constexpr, PACKED: tl.constexpr):
    """:func:`rows_of` head h of batch entry z, or of the packed document at ``start``: x is a
    descriptor, or a pointer with the strides batch, token and head.
    """
    outer, inner, row = described_rows(z, start, length, PACKED)
    if DESCRIBED:
        return rows_of(x, token, h, outer, inner, row, DESCRIBED)
    else:  # without it, Triton would compile both
        return rows_of(x + z * batch + start * token + h * head, token, h, outer, inner, row, DESCRIBED)


@triton.jit
def load_rows(
    source,
    first,
    row_end,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    COLUMN: tl.constexpr = 0,
):
    """:func:`load_tile` from :func:`rows_of`, of the columns from COLUMN on; of a descriptor,
    hardware puts the zeros, masked or not.
    """
    if DESCRIBED:
        descriptor, head, outer, inner, row = source
        tile = descriptor.load([outer, inner, head, row + first, COLUMN]).reshape(BLOCK_ROWS, BLOCK_WIDTH)
    else:
        pointer, stride = source
        at = pointer + COLUMN
        tile = load_tile(at, stride, first, row_end, BLOCK_ROWS, WIDTH - COLUMN, BLOCK_WIDTH, MASKED)
    return tile


@triton.jit
def load_parts(
    source,
    first,
    row_end,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """:func:`load_rows` as parts (BLOCK_ROWS, BLOCK_WIDTH)."""
    parts = ()
    for column in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        part = load_rows(source, first, row_end, BLOCK_ROWS, WIDTH, BLOCK_WIDTH, MASKED, DESCRIBED, column)
        parts = parts + (part,)  # type: ignore[assignment]  # noqa: RUF005  Triton has no stars
    return parts


@triton.jit
def zero_parts(BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Sums to add to, as many parts as :func:`load_parts` gives."""
    parts = ()
    for _ in tl.static_range(0, WIDTH, BLOCK_WIDTH):
        parts = parts + (tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return parts


@triton.jit
def parts_in_registers(parts):
    """As what comes out of arithmetic is: shared memory then has room for a third stage."""
    found = ()
    for c in tl.static_range(len(parts)):
        found = found + (parts[c] + 0.0,)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def store_parts(
    pointer,
    stride,
    first,
    row_end,
    parts,
    SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """:func:`store_tile` of parts as :func:`load_parts` gives them, times SCALE."""
    for c in tl.static_range(len(parts)):
        at, part = pointer + c * BLOCK_WIDTH, parts[c] * SCALE
        store_tile(at, stride, first, row_end, part, BLOCK_ROWS, WIDTH - c * BLOCK_WIDTH, BLOCK_WIDTH)


@triton.jit
def store_tile(
    pointer, stride, first, row_end, tile, BLOCK_ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """The opposite of :func:`load_tile`, in the pointer's dtype."""
    at = _addresses(pointer, stride, first, BLOCK_ROWS, BLOCK_WIDTH)
    present = (first + tl.arange(0, BLOCK_ROWS) < row_end)[:, None]
    if WIDTH < BLOCK_WIDTH:
        present = present & (tl.arange(0, BLOCK_WIDTH) < WIDTH)[None, :]
    tl.store(at, tile.to(pointer.dtype.element_ty), mask=present)


@triton.jit
def store_rows(
    target,
    first,
    row_end,
    column: tl.constexpr,
    tile,
    BLOCK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """The opposite of :func:`load_rows`, for the columns from ``column`` on."""
    if DESCRIBED:
        descriptor, head, outer, inner, row = target
        tile = tile.to(descriptor.dtype).reshape(1, 1, 1, BLOCK_ROWS, BLOCK_WIDTH)
        descriptor.store([outer, inner, head, row + first, column], tile)
    else:
        pointer, stride = target
        store_tile(pointer + column, stride, first, row_end, tile, BLOCK_ROWS, WIDTH - column, BLOCK_WIDTH)


@triton.jit
def pieces(tile, PIECES: tl.constexpr):
    """A tile's columns as 1, 2 or 4 tiles, side by side: what is done to one at a time needs few
    registers.
    """
    if PIECES == 1:
        return (tile,)
    else:
        a, b = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
        if PIECES == 2:
            return a, b
        else:
            a, b = pieces(a, 2), pieces(b, 2)
            return a[0], a[1], b[0], b[1]


@triton.jit
def product(a, b, accumulator=None):
    """Matrix product in float32; float32 operands are not rounded on the way.

    Of float32 operands a product is summed apart and then added: one chain of all its terms, as a
    GPU without tensor cores for them has it, is several times less exact. Tensor cores sum so
    themselves. The compiler would make one of both, but for a limit on what is summed apart.
    """
    if a.dtype == tl.float32 and accumulator is not None:
        of_tile = tl.dot(a, b, input_precision="ieee", out_dtype=tl.float32, max_num_imprecise_acc=a.shape[1])
        return accumulator + of_tile
    else:  # without it, Triton would compile both
        return tl.dot(a, b, accumulator, input_precision="ieee", out_dtype=tl.float32)


@triton.jit
def inner_products(a, b):
    """``a b^T`` of two tuples of parts, whose columns are summed over."""
    s = product(a[0], tl.trans(b[0]))
    for c in tl.static_range(1, len(a)):
        s = product(a[c], tl.trans(b[c]), s)
    return s


@triton.jit
def add_products(sums, a, b):
    """``sums + a b`` of a tuple of parts b."""
    found = ()
    for c in tl.static_range(len(b)):
        found = found + (product(a, b[c], sums[c]),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit
def visible(queries, keys, shift, seqlen_k, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys (broadcast against queries) are seen. ``shift`` is the key position of query 0."""
    last = seqlen_k - 1
    if HAS_RIGHT:
        last = tl.minimum(last, queries + shift + right)
    seen = keys <= last
    if HAS_LEFT:
        seen = seen & (keys >= queries + shift - left)
    return seen


@triton.jit
def _tile_ranges(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """Cut [begin, end) into a masked, an unmasked and a masked range of whole tiles: four rising
    bounds.

    Tiles within [full_begin, full_end) need no mask.
    """
    begin = tl.maximum(begin, 0) // BLOCK * BLOCK
    end = tl.maximum(end, begin)
    last = tl.cdiv(end, BLOCK) * BLOCK
    middle = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(full_begin, 0), BLOCK) * BLOCK, begin), last)
    middle_end = tl.maximum(tl.minimum(tl.maximum(full_end, 0) // BLOCK * BLOCK, last), middle)
    return begin, middle, middle_end, end


@triton.jit
def key_ranges(
    first_query,
    last_query,
    shift,
    seqlen_k,
    left,
    right,
    BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Ranges of keys for the queries first_query to last_query: masked, unmasked, masked."""
    begin, full_begin, full_end, end = 0, 0, seqlen_k, seqlen_k
    if HAS_LEFT:
        begin = first_query + shift - left
        full_begin = last_query + shift - left
    if HAS_RIGHT:
        end = tl.minimum(seqlen_k, last_query + shift + right + 1)
        full_end = tl.minimum(seqlen_k, first_query + shift + right + 1)
    return _tile_ranges(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def query_ranges(
    first_key,
    last_key,
    shift,
    seqlen_q,
    seqlen_k,
    left,
    right,
    BLOCK: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Ranges of queries for a tile of keys: masked, unmasked, masked. A tile past the last key has
    no unmasked one.
    """
    begin, full_begin, full_end, end = 0, 0, seqlen_q, seqlen_q
    if HAS_RIGHT:
        begin = first_key - shift - right
        full_begin = last_key - shift - right
    if HAS_LEFT:
        end = tl.minimum(seqlen_q, last_key - shift + left + 1)
        full_end = tl.minimum(seqlen_q, first_key - shift + left + 1)
    if last_key >= seqlen_k:
        full_end = 0
    return _tile_ranges(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def tanh(x):
    return 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))


@triton.jit
def to_logits(products, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scaled and capped, in units of log2."""
    if SOFTCAP > 0:
        return tanh(products * (SCALE / SOFTCAP)) * (SOFTCAP * LOG2_E)
    return products * (SCALE * LOG2_E)


@triton.jit
def cap_slope(logits, SOFTCAP: tl.constexpr):
    """Derivative of the soft cap at a capped logit (in units of log2)."""
    capped = logits / (SOFTCAP * LOG2_E)
    return 1 - capped * capped


@triton.jit
def _bound(cu_seqlens_pointer, z, tokens):
    # Bounds that nobody checked (reading them on a GPU would stall the stream) are cut to the
    # tensors' tokens: whatever they say, nothing outside is read or written.
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_pointer + z), 0), tokens)


@triton.jit
def document_tile(tile, cu_seqlens_pointer, documents, tokens, BLOCK: tl.constexpr):
    """Which document a tile of packed tokens belongs to, and its first row there; a row that is not
    in the document: the tile is empty.

    Document z has its tiles from number cu_seqlens[z] // BLOCK + z on. That leaves room for the
    last tile of each document before it, cut or not, so tokens // BLOCK + documents + 1 tiles are
    enough for any bounds. Tokens after the last document count as one more, number ``documents``.
    """
    z, last = 0, documents
    while z < last:  # the last document whose first tile is not beyond this one
        middle = (z + last + 1) // 2
        begins = _bound(cu_seqlens_pointer, middle, tokens) // BLOCK + middle <= tile
        z = tl.where(begins, middle, z)
        last = tl.where(begins, last, middle - 1)
    return z, (tile - z - _bound(cu_seqlens_pointer, z, tokens) // BLOCK) * BLOCK


@triton.jit
def document(z, cu_seqlens_pointer, seqlen, tokens, documents, end):
    """Of batch entry z: its first row in tensors with strides, its first token counted over the
    batch, its length.

    Tokens after the last packed document are one more that reaches to ``end``: their number where
    its rows are served, 0 where it sees them. So they get zeros.
    """
    if cu_seqlens_pointer is not None:
        start = _bound(cu_seqlens_pointer, z, tokens)
        end = tl.load(cu_seqlens_pointer + z + 1, mask=z < documents, other=end)
        length = tl.maximum(tl.minimum(end, tokens) - start, 0)
        return start.to(tl.int64), start.to(tl.int64), length
    return tl.cast(0, tl.int64), z.to(tl.int64) * seqlen, seqlen
