"""Attention, activation and feed-forward layers with plain keyword arguments.

They need torch and motif_kernels alone: nothing here imports transformers, or knows of models, recipes or sharding.
"""

from .cache import CachePosition
from .cross_entropy import IGNORE_INDEX, CrossEntropy, linear_cross_entropy
from .differential_attention_v2 import DifferentialAttentionV2
from .grouped_differential_attention import (
    DifferentialAttention,
    GroupedDifferentialAttention,
    default_lambda_init,
)
from .mlp import PolyNormMLP, SwiGLUMLP
from .padding import PaddingMask, cu_seqlens_from_position_ids
from .poly_norm import PolyNorm
from .rotary import RotaryEmbedding, apply_rotary
from .softmax_attention import SoftmaxAttention

__all__ = [
    "IGNORE_INDEX",
    "CachePosition",
    "CrossEntropy",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "GroupedDifferentialAttention",
    "PaddingMask",
    "PolyNorm",
    "PolyNormMLP",
    "RotaryEmbedding",
    "SoftmaxAttention",
    "SwiGLUMLP",
    "apply_rotary",
    "cu_seqlens_from_position_ids",
    "default_lambda_init",
    "linear_cross_entropy",
]
