"""Tensor descriptors: a tile is one request to the GPU's copy engine (TMA), with no address in
registers and no bounds to compare.

A descriptor has the axes (outer, inner, head, row, column). Of a batch, ``inner`` is its entry and
``outer`` 0. Packed documents need an end that changes from document to document. As in
``triton.tools.ragged_tma``, rows end at :data:`FAR`: a document's last row is put right before it,
and the first two axes lead to the address from there, by a sum that wraps around 64 bits.
"""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from motif_kernels.impl.triton.attention_tiles import FAR

_MOST = 0x7FFF0000
_ALIGNMENT = 16  # bytes


def describable(*tensors: Tensor | None) -> bool:
    """Whether the hardware takes descriptors of these (B, S, H, W) or (T, H, W): addresses that are
    multiples of 16 bytes.
    """

    def aligned(t: Tensor) -> bool:
        size = t.element_size()
        axes = zip(t.shape[:-1], t.stride()[:-1], strict=True)
        return t.data_ptr() % _ALIGNMENT == 0 and all(n == 1 or (s > 0 and s * size % _ALIGNMENT == 0) for n, s in axes)

    return all(t is None or (t.numel() > 0 and aligned(t)) for t in tensors)


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of tiles (1, 1, 1, rows, columns) of a batch (B, S, H, W) or packed tokens (T, H, W)."""
    # An axis of one entry may have any stride, and needs one.
    *batch, token, head = (s if n > 1 else _ALIGNMENT for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True))
    if batch:
        shape = [1, x.shape[0], x.shape[2], x.shape[1], x.shape[3]]
        strides = [_ALIGNMENT, batch[0], head, token, 1]
    else:
        shape = [_MOST, _MOST, x.shape[1], FAR.value, x.shape[2]]
        strides = [(1 << 34) - token, token, head, token, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, rows, columns])
