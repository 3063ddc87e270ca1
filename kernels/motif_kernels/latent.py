"""Caches whose one head is key and value in one: the latents of multi-head latent attention.

A token's vector of D columns is its key for all heads, and the first Dv of them are its value.
"""

from torch import Tensor

from motif_kernels.types import AttentionInputs

MAX_LATENT, MAX_ROTATED = 512, 128
"""Widths that the kernel's tiles have room for."""
MAX_QUERY_ROWS = 32
"""Queries times signal heads of a key head that are decoding where keys and values are apart; more
are prefill, which the training kernels serve.
"""


def are_few(inputs: AttentionInputs) -> bool:
    """Whether keys and values that are apart are to be read in place for so many queries."""
    return inputs.q1.shape[1] * inputs.q1.shape[2] // inputs.v.shape[2] <= MAX_QUERY_ROWS


def may_be(inputs: AttentionInputs) -> bool:
    """Whether widths, heads and strides are those of latents, which a kernel serves; where memory
    lies is not asked.
    """
    k1, k2, v = inputs.k1, inputs.k2, inputs.v
    return all(_like(v, k) for k in (k1, k2) if k is not None)


def _like(v: Tensor, k: Tensor) -> bool:
    d, dv = k.shape[-1], v.shape[-1]
    alone = k.shape[2] == v.shape[2] == 1
    return alone and dv <= min(d, MAX_LATENT) and d - dv <= MAX_ROTATED and k.stride()[:2] == v.stride()[:2]


def is_latent(inputs: AttentionInputs) -> bool:
    """Whether k2 is k1, and v its first columns, in one memory; for tensors that have any."""
    keys = inputs.k1.data_ptr()
    return may_be(inputs) and inputs.v.data_ptr() == keys and (inputs.k2 is None or inputs.k2.data_ptr() == keys)
