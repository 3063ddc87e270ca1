"""Attention, activation and feed-forward layers with plain keyword arguments.

They need torch and motif_kernels alone: nothing here imports transformers, or knows of models,
recipes or sharding.
"""

from motifarch.layers.base_attention import BaseAttention
from motifarch.layers.cache import CachePosition
from motifarch.layers.cross_entropy import IGNORE_INDEX, CrossEntropy, linear_cross_entropy
from motifarch.layers.differential_attention_v2 import DifferentialAttentionV2
from motifarch.layers.experts import Experts
from motifarch.layers.grouped_differential_attention import (
    DifferentialAttention,
    GroupedDifferentialAttention,
    default_lambda_init,
)
from motifarch.layers.grouped_differential_latent_attention import GroupedDifferentialLatentAttention
from motifarch.layers.hyper_connections import HyperConnections, expand_streams, merge_streams
from motifarch.layers.mixture_of_experts import MixtureOfExperts, MoEOutput, MoEStatistics
from motifarch.layers.mlp import PolyNormMLP, SwiGLUMLP
from motifarch.layers.multi_token_prediction import MultiTokenPrediction
from motifarch.layers.padding import PaddingMask, cu_seqlens_from_position_ids
from motifarch.layers.poly_norm import GroupedPolyNorm, PolyNorm
from motifarch.layers.rms_norm import RMSNorm
from motifarch.layers.rotary import RotaryEmbedding, apply_rotary
from motifarch.layers.router import Router
from motifarch.layers.softmax_attention import SoftmaxAttention

__all__ = [
    "IGNORE_INDEX",
    "BaseAttention",
    "CachePosition",
    "CrossEntropy",
    "DifferentialAttention",
    "DifferentialAttentionV2",
    "Experts",
    "GroupedDifferentialAttention",
    "GroupedDifferentialLatentAttention",
    "GroupedPolyNorm",
    "HyperConnections",
    "MixtureOfExperts",
    "MoEOutput",
    "MoEStatistics",
    "MultiTokenPrediction",
    "PaddingMask",
    "PolyNorm",
    "PolyNormMLP",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "SoftmaxAttention",
    "SwiGLUMLP",
    "apply_rotary",
    "cu_seqlens_from_position_ids",
    "default_lambda_init",
    "expand_streams",
    "linear_cross_entropy",
    "merge_streams",
]
