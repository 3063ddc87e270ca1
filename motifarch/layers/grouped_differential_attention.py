"""GDA (arXiv 2510.06949) and its 1:1 case, DIFF V1 (arXiv 2410.05258)."""

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from motifarch.layers.base_attention import AttentionLayerOptions, BaseAttention, check_heads
from motifarch.layers.head_norm import SubNorm
from motifarch.layers.ulysses import sum_gradient


def default_lambda_init(depth: float) -> float:
    """``0.8 - 0.6 exp(-0.3 depth)``, depth counted from 0 (arXiv 2410.05258, section 3.1)."""
    return 0.8 - 0.6 * math.exp(-0.3 * depth)


def scalar_lambda(layer: Any) -> Tensor:
    """``exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init``
    (arXiv 2410.05258, equation 2).

    Args:
        layer: has the four vectors (D,) and the number lambda_init.

    Returns:
        A scalar tensor, float32 (float64 for float64 vectors).
    """
    q1, k1, q2, k2 = layer.lambda_q1, layer.lambda_k1, layer.lambda_q2, layer.lambda_k2
    dtype = torch.promote_types(q1.dtype, torch.float32)
    if any(v.dtype != dtype for v in (q1, k1, q2, k2)):
        q1, k1, q2, k2 = q1.to(dtype), k1.to(dtype), q2.to(dtype), k2.to(dtype)
    return torch.exp((q1 * k1).sum()) - torch.exp((q2 * k2).sum()) + layer.lambda_init


class GroupedDifferentialAttention(BaseAttention):
    """Differential attention in which a group of signal heads shares one noise head.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head]; key heads as
    pairs (signal, noise); value heads as pairs joined to a width of ``Dv = 2 * head_dim``. Every
    signal head gives Dv numbers, so that o_proj reads ``(num_heads - num_noise_heads) * 2 *
    head_dim``. Parameter names are those of the released Motif-2 models.

    With ``paired_kv=False`` keys and values are ordinary heads of width ``Dv = head_dim``, one key
    for signal and noise alike: the key/value heads, the cache and o_proj's inputs are then those of
    softmax attention with the signal heads.

    The output is ``(1 - lambda_init) * RMSNorm(A1 V - lambda A2 V)`` with one scalar
    ``lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init`` a layer.

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together: 40 in Motif-2-12.7B.
        num_noise_heads: noise heads: 8 there, for groups of 4 signal heads.
        num_kv_heads: key/value heads before pairing, even; half of it must divide num_noise_heads.
            Without pairs: key/value heads, which must divide num_noise_heads.
        head_dim: D, width of a query/key head.
        layer_idx: position in the model from 0: the cache's key, and lambda_init's depth.
        paired_kv: keys in pairs (signal, noise) and values of double width, or ordinary key/value
            heads.
        lambda_init: the constant; default :func:`default_lambda_init` of layer_idx. (The released
            Motif checkpoints count depth from -1; their model class passes its own value.)
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``; without it the
            difference is used as it is.
        norm_eps: the sub-norm's epsilon.
        **options: of every attention layer
            (:class:`~motifarch.layers.base_attention.BaseAttention`): ``qk_norm``, ``qk_norm_eps``,
            ``window_size``, ``causal``, ``softmax_scale``, ``bias``, ``backend``, ``device`` and
            ``dtype``.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_noise_heads: int,
        num_kv_heads: int,
        head_dim: int,
        layer_idx: int,
        paired_kv: bool = True,
        lambda_init: float | None = None,
        sub_norm: bool = True,
        norm_eps: float = 1e-5,
        **options: Unpack[AttentionLayerOptions],
    ) -> None:
        check_heads(num_heads, num_noise_heads, num_kv_heads, paired_keys=paired_kv)
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=num_noise_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            paired_kv=paired_kv,
            lambda_init=default_lambda_init(layer_idx) if lambda_init is None else lambda_init,
            **options,
        )
        device, dtype = options.get("device"), options.get("dtype")
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim, device=device, dtype=dtype))
        if sub_norm:
            self.subln = SubNorm(self.v_head_dim, eps=norm_eps, device=device, dtype=dtype)
        self.reset_lambda()

    def reset_lambda(self) -> None:
        """Draw the four lambda vectors from N(0, 0.1), as the paper's code does."""
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=0.1)

    def compute_lambda(self) -> Tensor:
        """The layer's lambda: a float32 (float64) scalar tensor."""
        return scalar_lambda(self)

    def _lambda(self, hidden_states: Tensor) -> Tensor:
        # One number for all heads: with tensor parallelism each rank's give a part of its gradient.
        return sum_gradient(self.compute_lambda(), self.tensor_group)

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return (
            f"signal_heads={self.num_heads - self.num_noise_heads}, noise_heads={self.num_noise_heads}, "
            f"kv_heads={self.num_kv_heads}, paired_kv={self.paired_kv}, lambda_init={self.lambda_init:.4f}, "
            f"window_size={self.window_size}"
        )


class DifferentialAttention(GroupedDifferentialAttention):
    """DIFF V1 (arXiv 2410.05258): as many noise heads as signal heads, in adjacent pairs
    (signal, noise).

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together, even.
        num_kv_heads: key/value heads before pairing, even.
        head_dim: D; values have 2D.
        layer_idx: position in the model, from 0.
        **options: those of GroupedDifferentialAttention, but num_noise_heads.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, num_kv_heads: int, head_dim: int, layer_idx: int, **options: Any
    ) -> None:
        if num_heads % 2:
            raise ValueError(
                f"num_heads={num_heads} must be even: heads come in pairs, one for signal and one for noise"
            )
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=num_heads // 2,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            **options,
        )
