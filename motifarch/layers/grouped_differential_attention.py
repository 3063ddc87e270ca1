"""GDA (arXiv 2510.06949) and its 1:1 case, DIFF V1 (arXiv 2410.05258)."""

import math
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from motifarch.layers.group_sum import sum_gradient
from motifarch.layers.head_counts import check_heads, default_head_dim, noise_heads_of
from motifarch.layers.head_norm import SubNorm
from motifarch.layers.projected_attention import AttentionLayerOptions, ProjectedAttention


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


class GroupedDifferentialAttention(ProjectedAttention):
    """Differential attention in which a group of signal heads shares one noise head.

    Query heads lie as ``num_noise_heads`` blocks of [g signal heads, 1 noise head]; key heads as
    pairs (signal, noise); value heads as pairs joined to a width of ``Dv = 2 * head_dim``. Every
    signal head gives Dv numbers, so that o_proj reads ``(num_heads - num_noise_heads) * 2 *
    head_dim``. Parameter names are those of the released Motif-2 models.

    With ``paired_kv=False`` keys and values are ordinary heads of width ``Dv = head_dim``, one key
    for signal and noise alike: the key/value heads, the cache and o_proj's inputs are then those of
    softmax attention with the signal heads.

    ``GroupedDifferentialAttention(dim, num_heads=10, ratio=4)`` has eight signal heads in two
    groups, each with its noise head and its key/value pair. The four projections then have ``(3 + 5
    / ratio) dim ** 2`` weights, 4.25 ``dim ** 2`` at 4:1, and ``4 dim ** 2`` at 1:1 (DIFF V1's
    widths); softmax attention has ``4 dim ** 2``.

    The output is ``(1 - lambda_init) * RMSNorm(A1 V - lambda A2 V)`` with one scalar
    ``lambda = exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init`` a layer.

    Args:
        hidden_size: e.
        num_heads: signal and noise heads together: 40 in Motif-2-12.7B, a multiple of ratio + 1.
        ratio: signal heads a noise head: 4 there.
        num_noise_heads: noise heads, in place of ratio: 8 there.
        num_kv_heads: key/value heads before pairing, even; half of it must divide num_noise_heads.
            Without pairs: key/value heads, which must divide num_noise_heads. Default: a pair, or a
            head, for each noise head.
        head_dim: D, width of a query/key head; default hidden_size divided by the signal heads, as
            in Motif-2-12.7B; at 1:1 by num_heads, as in DIFF V1.
        layer_idx: position in the model from 0: lambda_init's depth (0 if it is not given), and the
            key in a cache, which a layer without one does not take.
        paired_kv: keys in pairs (signal, noise) and values of double width, or ordinary key/value
            heads.
        lambda_init: the constant; default :func:`default_lambda_init` of layer_idx. (The released
            Motif checkpoints count depth from -1; their model class passes its own value.)
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``; without it the
            difference is used as it is.
        norm_eps: the sub-norm's epsilon.
        **options: of every attention layer
            (:class:`~motifarch.layers.projected_attention.ProjectedAttention`): ``qk_norm``,
            ``qk_norm_eps``, ``window_size``, ``causal``, ``softmax_scale``, ``bias``, ``dropout``,
            ``context_dim``, ``backend``, ``device`` and ``dtype``.

    Raises:
        ValueError: heads that do not divide, or neither or both of ratio and num_noise_heads.
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
        paired_kv: bool = True,
        lambda_init: float | None = None,
        sub_norm: bool = True,
        norm_eps: float = 1e-5,
        **options: Unpack[AttentionLayerOptions],
    ) -> None:
        noise_heads = noise_heads_of(num_heads, ratio, num_noise_heads)
        if num_kv_heads is None:
            num_kv_heads = 2 * noise_heads if paired_kv else noise_heads
        check_heads(num_heads, noise_heads, num_kv_heads, paired_keys=paired_kv)
        if head_dim is None:
            signal_heads = num_heads - noise_heads
            head_dim = default_head_dim(hidden_size, num_heads if signal_heads == noise_heads else signal_heads)
        super().__init__(
            hidden_size,
            num_heads=num_heads,
            num_noise_heads=noise_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            layer_idx=layer_idx,
            paired_kv=paired_kv,
            lambda_init=default_lambda_init(layer_idx or 0) if lambda_init is None else lambda_init,
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
        **options: those of GroupedDifferentialAttention, but ratio and num_noise_heads. By default
            there are num_heads key heads, and head_dim is hidden_size / num_heads, as in the paper.

    Raises:
        ValueError: heads that do not divide.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, **options: Any) -> None:
        if num_heads % 2:
            raise ValueError(
                f"num_heads={num_heads} must be even: heads come in pairs, one for signal and one for noise"
            )
        super().__init__(hidden_size, num_heads=num_heads, num_noise_heads=num_heads // 2, **options)
