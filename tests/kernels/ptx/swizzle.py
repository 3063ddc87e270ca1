"""How tiles lie in shared memory: rows of up to 128 bytes with their 16-byte chunks exchanged."""

import numpy as np

from tests.kernels.ptx.program import Fault
from tests.kernels.ptx.shared import Shared

BITS = {128: 7, 64: 3, 32: 1, 16: 0}  # of the chunk's number that are exchanged, by bytes of a row


def swizzled(addresses: np.ndarray, width: int) -> np.ndarray:
    """Where bytes of a tile with rows of ``width`` bytes really lie."""
    return addresses ^ (((addresses >> 7) & BITS[width]) << 4)


def tile(start: int, leading: int, stride: int, width: int, rows: int, transposed: bool) -> np.ndarray:
    """Where the (rows, 16) two-byte numbers of an operand lie; rows are of M or of N."""
    r, k = np.meshgrid(np.arange(rows), np.arange(16), indexing="ij")
    if transposed:
        n = width // 2
        at = start + r // n * leading + k // 8 * stride + k % 8 * width + r % n * 2
    else:
        at = start + r // 8 * stride + r % 8 * width + k * 2
    return swizzled(at, width)


class Operands:
    """Tiles of shared memory by their descriptors: elements and granules."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.known: dict[tuple[int, int, bool], tuple[np.ndarray, np.ndarray]] = {}

    def find(self, descriptor: int, rows: int, transposed: bool) -> tuple[np.ndarray, np.ndarray]:
        key = descriptor, rows, transposed
        if key not in self.known:
            start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
            width = {1: 128, 2: 64, 3: 32}.get(descriptor >> 62)
            if width is None or descriptor >> 49 & 7:
                raise NotImplementedError(f"wgmma descriptor {descriptor:#x}")
            at = tile(start, leading, stride, width, rows, transposed)
            if at.max() >= self.shared.limit or at.min() < 1024:
                raise Fault(f"wgmma reads byte {at.max() - 1024} outside of shared memory, descriptor {descriptor:#x}")
            self.known[key] = at >> 1, np.unique(at >> self.shared.shift)
        return self.known[key]
