"""Attention and activation functions for differential architectures.

The public names, in FlashAttention's conventions (batch, seqlen, heads, headdim). Importing this
package needs torch alone.
"""

from motif_kernels.combine import diff_combine
from motif_kernels.diff_attention import diff_attn_func, diff_attn_varlen_func
from motif_kernels.diff_decoding import diff_attn_with_kvcache
from motif_kernels.grouped_poly_norm import grouped_mul_poly_norm
from motif_kernels.hyper_connections import read_streams, stream_maps, update_streams
from motif_kernels.moe import grouped_linear
from motif_kernels.poly_norm import mul_poly_norm, poly_norm
from motif_kernels.rms_norm import rms_norm
from motif_kernels.routing import combine_rows, dispatch_rows, expert_weights, select_experts, sort_by_expert
from motif_kernels.softmax import softmax_attn_func, softmax_attn_varlen_func, softmax_attn_with_kvcache

__all__ = [
    "combine_rows",
    "diff_attn_func",
    "diff_attn_varlen_func",
    "diff_attn_with_kvcache",
    "diff_combine",
    "dispatch_rows",
    "expert_weights",
    "grouped_linear",
    "grouped_mul_poly_norm",
    "mul_poly_norm",
    "poly_norm",
    "read_streams",
    "rms_norm",
    "select_experts",
    "softmax_attn_func",
    "softmax_attn_varlen_func",
    "softmax_attn_with_kvcache",
    "sort_by_expert",
    "stream_maps",
    "update_streams",
]
