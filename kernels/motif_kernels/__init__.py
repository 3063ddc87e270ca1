"""Attention and activation functions for differential architectures.

The public names, in FlashAttention's conventions (batch, seqlen, heads, headdim). Importing this
package needs torch alone.
"""

from types import ModuleType

from motif_kernels.after_import import after_import
from motif_kernels.combine import diff_combine
from motif_kernels.diff_attention import diff_attn_func, diff_attn_varlen_func
from motif_kernels.diff_decoding import diff_attn_with_kvcache
from motif_kernels.poly_norm import mul_poly_norm, poly_norm

__all__ = [
    "diff_attn_func",
    "diff_attn_varlen_func",
    "diff_attn_with_kvcache",
    "diff_combine",
    "mul_poly_norm",
    "poly_norm",
]


def _register_flop_formulas(flop_counter: ModuleType) -> None:
    from motif_kernels import flops  # noqa: F401


# torch's flop counter imports triton: who does not count does not pay for it.
after_import("torch.utils.flop_counter", _register_flop_formulas)
