"""A pseudorandom permutation of ``range(size)``, computed index by index."""

import hashlib

import numpy as np

_ROUNDS = 8
# The multipliers of MurmurHash3's 64-bit finaliser (Appleby, public domain).
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


class Permutation:
    """A keyed bijection of ``range(size)`` in O(1) memory: a Feistel network with cycle walking.

    The network permutes the smallest square power of two that holds ``size`` (fewer than four times
    as many numbers); an image outside ``range(size)`` is sent through again until it falls inside.
    The result depends on ``size`` and ``key`` alone, not on machine, versions or earlier queries.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), method 2 and
    section 4.

    The key is whatever names this permutation, such as a seed, a dataset's number and an epoch.

    Raises:
        ValueError: if ``size`` is less than 1.
    """

    def __init__(self, size: int, *key: int | str) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got size={size}")
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._half_mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.shake_128(repr((size, *key)).encode()).digest(8 * _ROUNDS)
        self._round_keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Map positions (integers of any shape) to elements (int64, the same shape).

        Raises:
            IndexError: if a position lies outside ``range(size)``.
        """
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.size):
            raise IndexError(f"position outside range({self.size}): {indices.min()} to {indices.max()}")
        images = self._network(indices.astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(images >= self.size)
        while outside.size:
            images[outside] = self._network(images[outside])
            outside = outside[images[outside] >= self.size]
        return images.astype(np.int64).reshape(indices.shape)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        left, right = numbers >> self._half_bits, numbers & self._half_mask
        for round_key in self._round_keys:
            mixed = right + round_key  # wraps modulo 2^64, as meant
            mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_1
            mixed = (mixed ^ (mixed >> _SHIFT)) * _MIX_2
            left, right = right, left ^ ((mixed ^ (mixed >> _SHIFT)) & self._half_mask)
        return (left << self._half_bits) | right
