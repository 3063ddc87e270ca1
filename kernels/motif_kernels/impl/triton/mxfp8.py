"""MXFP8 in a kernel: E4M3 values with a power of two as the scale of each 32 columns.

By integers, exactly as :func:`motif_kernels.reference.to_mxfp8`: no division, no logarithm, and the
same on every GPU, also on those without instructions for 8 bits.
"""

import triton
import triton.language as tl

_SIGNLESS = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)
_FRACTION = tl.constexpr(0x7FFFFF)


@triton.jit
def _codes(x):
    """E4M3 of float32 within [-448, 448], or NaN, to the nearest, ties to even, as uint8."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & _SIGNLESS
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)  # exponents of 127 less are of 7
    # Below 2^-6 all are multiples of 2^-9, which is what the last place of 2^14 is worth.
    small = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0x3C800000, small, normal)
    code = tl.where(size > _INFINITY, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantised(x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Of float32 x (ROWS, BLOCK): values (ROWS, BLOCK) and scales (ROWS, BLOCK // 32), as uint8."""
    x = tl.reshape(x, [ROWS, BLOCK // 32, 32])
    largest = tl.max(x.to(tl.int32, bitcast=True) & _SIGNLESS, axis=2, keep_dims=True)
    scale = (largest >> 23) - 8 + tl.where((largest & _FRACTION) > 0x600000, 1, 0)  # 448 is 1.75 * 2^8
    scale = tl.where(largest == _INFINITY, 254, tl.maximum(scale, 0))
    factor = tl.where(scale == 254, 0x400000, (254 - scale) << 23).to(tl.float32, bitcast=True)
    scaled = x * tl.where(scale == 0, 1.0, factor)
    scaled = tl.where(scaled > 448.0, 448.0, tl.where(scaled < -448.0, -448.0, scaled))
    scaled = tl.where(largest > _INFINITY, float("nan"), scaled)
    scale = tl.where(largest > _INFINITY, 255, scale)
    return tl.reshape(_codes(scaled), [ROWS, BLOCK]), tl.reshape(scale, [ROWS, BLOCK // 32]).to(tl.uint8)
