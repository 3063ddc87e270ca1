"""Differential attention in timm's vision transformers.

Shapes: B batch, N tokens, C their width, H heads, D width of a head.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from motifarch.integrations.shared_noise import NoiseQueries, SharedNoiseAttention


class Attention(nn.Module):
    """timm's ``Attention`` with noise heads: ``VisionTransformer(..., attn_layer=Attention)``.

    timm's ``num_heads`` are the signal heads, as they are in its models: 3 in ViT-Ti, 6 in ViT-S,
    12 in ViT-B, 16 in ViT-L. Each group of :attr:`ratio` of them gets a noise head (see
    :class:`~motifarch.integrations.shared_noise.SharedNoiseAttention`). timm hands a class no
    options of ours: another ratio is a subclass, ``class Ratio4(Attention): ratio = 4``.

    Parameters have timm's names, beside ``noise_queries`` and ``attention``. Weights of timm's own
    attention load: noise heads then start as their groups' first heads. With lambda 0, as it starts
    by default, it is timm's attention. From scratch, ``lambda_init = 0.8`` and ``sub_norm = True``
    are the papers'.

    Args:
        dim: C.
        num_heads: H, signal heads.
        attn_head_dim: D; default ``dim // num_heads``.
        dim_out: width of the output; default dim.
        qkv_bias: biases of queries, keys and values.
        qk_norm: ``norm_layer(D)`` of queries, noise queries too, and keys.
        scale_norm: ``norm_layer(H * D)`` before the output projection.
        proj_bias: a bias in the output projection.
        gated: multiply the attention's output by ``sigmoid(gate(x))``.
        attn_drop: in training mode, the share of each map's probabilities that are left out.
        proj_drop: dropout of the output.
        norm_layer: makes a norm of a width; with qk_norm or scale_norm.
        device: where the parameters are made.
        dtype: their dtype.
        **unsupported: arguments of timm's other attention classes, which are refused.

    Raises:
        ValueError: ratio does not divide num_heads, or an argument of rotary attention
            (``AttentionRope``, ``EvaAttention``), which is not served.
    """

    ratio: ClassVar[int] = 3
    """Signal heads a noise head."""
    lambda_init: ClassVar[float] = 0.0
    """The constant in lambda, at which it starts."""
    sub_norm: ClassVar[bool] = False
    """Whether each head's output is normalised and scaled by ``1 - lambda_init``."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unsupported: Any,
    ) -> None:
        super().__init__()
        if unsupported:
            raise ValueError(
                f"{', '.join(unsupported)}: arguments of timm's rotary attention (AttentionRope, EvaAttention), which "
                "is not served; take a transformer whose attention is timm.layers.Attention"
            )
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}; give attn_head_dim")
        if norm_layer is None and (qk_norm or scale_norm):
            raise ValueError(f"norm_layer is None with qk_norm={qk_norm}, scale_norm={scale_norm}; give nn.LayerNorm")
        new: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.head_dim = num_heads, attn_head_dim or dim // num_heads

        def norm(width: int, wanted: bool) -> nn.Module:
            return norm_layer(width, **new) if wanted and norm_layer is not None else nn.Identity()

        width = num_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * width, bias=qkv_bias, **new)
        self.q_norm, self.k_norm = norm(self.head_dim, qk_norm), norm(self.head_dim, qk_norm)
        noise_norm = norm(self.head_dim, qk_norm)
        self.noise_queries = NoiseQueries(
            dim, num_heads, self.head_dim, ratio=self.ratio, bias=qkv_bias, norm=noise_norm, **new
        )
        self.attention = SharedNoiseAttention(
            self.head_dim, lambda_init=self.lambda_init, sub_norm=self.sub_norm, **new
        )
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(width, scale_norm)
        self.gate = nn.Linear(dim, width, bias=qkv_bias, **new) if gated else None
        self.proj = nn.Linear(width, dim_out or dim, bias=proj_bias, **new)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_load_state_dict_pre_hook(_add_noise_heads)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """Tokens (B, N, C) to (B, N, dim_out).

        Args:
            x: tokens.
            attn_mask: what broadcasts to (B, H, N, N): bool, True where a token sees another, or
                floats that are added to the logits. A noise head has that of its group's first
                head.
            is_causal: a token sees none after it; not together with attn_mask.
            rope: not served.

        Raises:
            ValueError: both masks, or rotary embeddings.
        """
        if rope is not None:
            raise ValueError("rope: rotary embeddings, those of timm's EVA models, are not served")
        if attn_mask is not None and is_causal:
            raise ValueError("attn_mask and is_causal=True were both given; let attn_mask say what each token sees")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k, noise_q = self.q_norm(q), self.k_norm(k), self.noise_queries(x)
        dropout = self.attn_drop.p if self.training else 0.0
        out = self.attention(q, k, v, noise_q, mask=attn_mask, causal=is_causal, dropout=dropout)
        out = self.norm(out)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shown by print(module)."""
        return f"signal_heads={self.num_heads}, noise_heads={self.num_heads // self.ratio}"


def _add_noise_heads(module: Attention, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Completes weights of timm's own attention, which are those of signal heads alone."""
    new = {name: t for name, t in module.state_dict().items() if name.startswith(("noise_queries.", "attention."))}
    if f"{prefix}qkv.weight" not in state_dict or any(f"{prefix}{name}" in state_dict for name in new):
        return
    for name in ("weight", "bias"):
        if f"noise_queries.proj.{name}" in new:
            query = state_dict[f"{prefix}qkv.{name}"].chunk(3)[0]
            new[f"noise_queries.proj.{name}"] = module.noise_queries.first_of_groups(query)
        if f"noise_queries.norm.{name}" in new:
            new[f"noise_queries.norm.{name}"] = state_dict[f"{prefix}q_norm.{name}"]
    state_dict.update({f"{prefix}{name}": t for name, t in new.items()})
