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

_GL_DTYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """How TMA reads tiles of ``rows`` tokens of one head.

    Args:
        x: (B, S, heads, width), or packed (total, heads, width), aligned as
            ``availability.can_serve`` asks.
        rows: tokens of a tile.
    """
    x = x if x.ndim == 4 else x[None]
    width = x.shape[-1]
    # A dimension of one is never stepped along, and its stride may be anything.
    strides = [width if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    block = [1, rows, 1, width]
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
def load_tile(source, z, row, head, ready, tile):
    """Start bringing a tile, whose bytes the barrier ``ready`` was told to expect."""
    tma.async_copy_global_to_shared(source, [z, row, head, 0], ready, tile)


@gluon.jit
def matrix(tile):
    """A tile in shared memory, as (rows, width)."""
    return tile.reshape([tile.shape[1], tile.shape[3]])


@gluon.jit
def document(z, cu_seqlens_pointer, seqlen, tokens):
    """Of sequence z: its place in a tensor's batch, its first row there, its first token counted
    over the batch, its length.

    Bounds that nobody checked (reading them on a GPU would stall the stream) are cut to the
    tensors' tokens: whatever they say, nothing outside is read or written.
    """
    if cu_seqlens_pointer is not None:
        start = gl.minimum(gl.maximum(gl.load(cu_seqlens_pointer + z), 0), tokens)
        length = gl.minimum(gl.load(cu_seqlens_pointer + z + 1), tokens) - start
        return 0, start, start.to(gl.int64), length
    return z, 0, z.to(gl.int64) * seqlen, seqlen


@gluon.jit
def tile_of_queries(turn, blocks, noise_heads, batch, section):
    """Which tile a program serves next: its block of queries, its noise head and its sequence,
    which is past the last where there is none.

    The last queries see most under a causal mask: tiles are dealt longest first, in every other
    round backwards. They come in sections of ``section`` heads, whose keys and values the GPU's
    cache can hold.
    """
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    index = turn * programs + (programs - 1 - place if turn % 2 == 1 else place)
    first = index // (section * blocks) * section
    size = gl.maximum(gl.minimum(section, noise_heads * batch - first), 1)
    within = index - first * blocks
    head = first + within % size
    return blocks - 1 - within // size, head % noise_heads, head // noise_heads
