"""Tiles of residual streams (R, n, E) in memory, for the kernels of hyper-connections.

A tile is ROWS tokens by BLOCK columns of one stream. Tokens and streams may be strided.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.constants import GATE_BOUND
from motif_kernels.reference import compute_dtype

_GATE_BOUND = tl.constexpr(GATE_BOUND)


@triton.jit
def load_tile(pointer, row_stride, rows, columns, mask, DTYPE: tl.constexpr):
    """(ROWS, BLOCK) in the compute dtype, 0 where masked; ``rows`` are int64."""
    return tl.load(pointer + rows[:, None] * row_stride + columns[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def store_tile(pointer, row_stride, rows, columns, mask, tile):
    """Round a tile to the array's dtype."""
    offsets = rows[:, None] * row_stride + columns[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_number(pointer, row_stride, rows, mask, DTYPE: tl.constexpr):
    """One number of each row: (ROWS,)."""
    return tl.load(pointer + rows * row_stride, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def clamp(x, BOUND: tl.constexpr):
    """Into [-BOUND, BOUND]; NaN stays NaN, as in torch.clamp."""
    return tl.where(x > BOUND, BOUND, tl.where(x < -BOUND, -BOUND, x))


@triton.jit
def gate_of(logits):
    """The sigmoid of bounded logits."""
    return 1.0 / (1.0 + tl.exp(-clamp(logits, _GATE_BOUND)))


@triton.jit
def gate_gradient(grad, logits):
    """From a gate's gradient to its logits': 0 where they were clamped."""
    gate = gate_of(logits)
    return tl.where(tl.abs(logits) <= _GATE_BOUND, grad * gate * (1.0 - gate), 0.0)


def triton_dtype(x: Tensor) -> Any:
    """The compute dtype."""
    return tl.float64 if compute_dtype(x) == torch.float64 else tl.float32
