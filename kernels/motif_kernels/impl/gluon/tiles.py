"""What the Gluon kernels share: tiles brought to shared memory by TMA, the ring they lie in, and
which tile of queries comes next.

A tile is (1, rows, 1, width) of a tensor (batch, tokens, heads, width), which need not be
contiguous; packed documents are a batch of one. Past the tensor's tokens a tile is zero.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from motif_kernels.impl.triton.attention_tiles import document

_GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """How TMA reads tiles of ``rows`` tokens of one head.

    Args:
        x: (B, S, heads, width), or packed (total, heads, width), aligned as
            ``availability.can_serve`` asks.
        rows: tokens of a tile.
        columns: of a tile; default all of the width.
    """
    x = x if x.ndim == 4 else x[None]
    width = x.shape[-1]
    # A dimension of one is never stepped along, and its stride may be anything.
    strides = [width if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    block = [1, rows, 1, columns or width]
    layout = gl.NVMMASharedLayout.get_default_for(block, _GL_DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), [*strides, 1], block, layout)


@gluon.jit
def allocate_tiles(source, COUNT: gl.constexpr):
    """Shared memory for COUNT tiles of a descriptor."""
    shape: gl.constexpr = source.block_type.shape
    return gl.allocate_shared_memory(source.dtype, [COUNT, 1, shape[1], 1, shape[3]], source.layout)


@gluon.jit
def allocate_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each passed when ARRIVALS have come; a fence must follow the last."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def load_tile(source, z, row, head, ready, tile, column=0):
    """Start bringing a tile, whose bytes the barrier ``ready`` was told to expect."""
    tma.async_copy_global_to_shared(source, [z, row, head, column], ready, tile)


@gluon.jit
def matrix(tile):
    """A tile in shared memory, as (rows, width)."""
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def sequence(z, cu_seqlens_pointer, seqlen, tokens, documents, end):
    """Of batch entry z, or of document z (``attention_tiles.document``): its place in a tensor's
    batch, its first row there, its first token counted over the batch, its length.
    """
    if cu_seqlens_pointer is not None:
        start, first_token, length = document(z, cu_seqlens_pointer, seqlen, tokens, documents, end)
        return 0, start.to(gl.int32), first_token, length
    else:
        return z, 0, z.to(gl.int64) * seqlen, seqlen


@gluon.jit
def tile_of_queries(turn, blocks, pairs, section):
    """Which tile a program serves in its turn: the block of queries, the pair of a head and a batch
    entry, and whether there is one.

    The last queries see most under a causal mask: tiles are dealt longest first, in every other
    round backwards. They come in sections of ``section`` pairs, whose keys and values the GPU's
    cache can hold.
    """
    programs, place = gl.num_programs(0), gl.program_id(0)
    dealt = turn * programs + (programs - 1 - place if turn % 2 == 1 else place)
    index = gl.minimum(dealt, pairs * blocks - 1)
    first = index // (section * blocks) * section
    within, size = index - first * blocks, gl.minimum(section, pairs - first)
    return blocks - 1 - within // size, first + within % size, dealt == index
