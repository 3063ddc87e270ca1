"""DIFF V2 (Microsoft, January 2026): lambda from the token; also grouped and gated."""

from typing import Unpack

import torch
from torch import Tensor, nn

from motifarch.layers.head_counts import check_heads, default_head_dim, noise_heads_of
from motifarch.layers.head_norm import SubNorm
from motifarch.layers.projected_attention import AttentionLayerOptions, ProjectedAttention
from motifarch.layers.wide_linear import WideLinear


class DifferentialAttentionV2(ProjectedAttention):
    """Twice the query heads over unchanged keys and values; ``lambda = sigmoid(x W)`` for each
    token and signal head.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head] (adjacent pairs
    for g = 1), and all heads of a block share one key/value head, for signal and noise alike. There
    is no sub-norm and no lambda_init by default.

    Args:
        hidden_size: E.
        num_heads: signal and noise heads together.
        ratio: signal heads a noise head, default 1; num_heads is a multiple of ratio + 1.
        num_noise_heads: noise heads, in place of ratio.
        num_kv_heads: key/value heads; must divide num_noise_heads. Default: one for each.
        head_dim: D, of query, key and value heads; default hidden_size divided by the signal heads.
        layer_idx: position in the model from 0: the key in a cache, which a layer without one does
            not take.
        gate: multiply the difference by ``sigmoid(x W_gate)``, elementwise.
        sub_norm: normalise each head's output (not together with gate).
        lambda_init: a constant added to lambda; with the sub-norm the output is scaled by
            ``1 - lambda_init``.
        norm_eps: the sub-norm's epsilon.
        **options: of every attention layer
            (:class:`~motifarch.layers.projected_attention.ProjectedAttention`): ``qk_norm``,
            ``qk_norm_eps``, ``window_size``, ``causal``, ``softmax_scale``, ``bias``, ``dropout``,
            ``context_dim``, ``backend``, ``device`` and ``dtype``. Lambda and the gate have no
            biases.

    Raises:
        ValueError: heads that do not divide, or gate together with sub_norm.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        ratio: int | None = None,
        num_noise_heads: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int | None = None,
        gate: bool = False,
        sub_norm: bool = False,
        lambda_init: float = 0.0,
        norm_eps: float = 1e-5,
        **options: Unpack[AttentionLayerOptions],
    ) -> None:
        if ratio is None and num_noise_heads is None:
            ratio = 1
        noise_heads = noise_heads_of(num_heads, ratio, num_noise_heads)
        num_kv_heads = noise_heads if num_kv_heads is None else num_kv_heads
        check_heads(num_heads, noise_heads, num_kv_heads, paired_keys=False)
        head_dim = default_head_dim(hidden_size, num_heads - noise_heads) if head_dim is None else head_dim
        if gate and sub_norm:
            raise ValueError("gate and sub_norm are both on; choose one epilogue")
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=noise_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            lambda_init=lambda_init,
            **options,
        )
        device, dtype, signal_heads = options.get("device"), options.get("dtype"), num_heads - noise_heads
        self.lambda_proj = WideLinear(hidden_size, signal_heads, device=device, dtype=dtype)
        self.gate_proj = (
            nn.Linear(hidden_size, signal_heads * head_dim, bias=False, device=device, dtype=dtype) if gate else None
        )
        if sub_norm:
            self.subln = SubNorm(head_dim, eps=norm_eps, device=device, dtype=dtype)

    def compute_lambda(self, hidden_states: Tensor) -> Tensor:
        """Lambda of each token and signal head, (B, S, Hs), float32 (float64)."""
        logits = self.lambda_proj(hidden_states)
        return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))) + self.lambda_init

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        return self.compute_lambda(hidden_states)

    def _gate(self, hidden_states: Tensor) -> Tensor | None:
        if self.gate_proj is None:
            return None
        return self.gate_proj(hidden_states).unflatten(-1, (-1, self.head_dim))

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"signal_heads={self.num_heads - self.num_noise_heads}, noise_heads={self.num_noise_heads}, "
            f"kv_heads={self.num_kv_heads}, gate={self.gate_proj is not None}, window_size={self.window_size}"
        )
