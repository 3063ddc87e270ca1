"""Differential attention in diffusers' transformers whose attention is its ``Attention`` class:
DiT, PixArt, Stable Diffusion 3 and others.

Shapes: B batch, S tokens, T tokens of the context, H heads, D width of a head.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from motifarch.errors import UserError
from motifarch.integrations.shared_noise import NoiseQueries, SharedNoiseAttention

try:
    from diffusers.models.attention_processor import Attention
except ImportError as error:
    raise ImportError("motifarch.integrations.diffusers needs diffusers: pip install 'motifarch[diffusers]'") from error

CONFIG_KEY = "motifarch"
"""Under which a patched model's config keeps the options of :func:`patch`."""

_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "JointAttnProcessor2_0")


def patch(model: nn.Module, ratio: int = 4, *, lambda_init: float = 0.0, sub_norm: bool = False) -> list[str]:
    """Set a :class:`DifferentialAttnProcessor` on each ``Attention`` of a model, in place.

    With the defaults it starts as the function that it was. ``model.save_pretrained`` keeps all of
    it; :func:`load_patched` loads that.

    Args:
        model: a diffusers model.
        ratio: signal heads a noise head; divides the model's heads.
        lambda_init: the constant in lambda, at which it starts.
        sub_norm: normalise each head's output, which cannot start as the same function.

    Returns:
        Names of the attention modules.

    Raises:
        UserError: a model without such modules, or with ones whose processor or parts are not
            served, by name; the model is as it was.
        ValueError: ratio does not divide the heads.
    """
    modules = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}
    if not modules:
        raise UserError(
            f"{type(model).__name__} has no attention of diffusers' class Attention; DiTTransformer2DModel, "
            "PixArtTransformer2DModel and SD3Transformer2DModel have"
        )
    for name, module in modules.items():
        processor = type(module.processor).__name__
        if processor not in _PROCESSORS:
            raise UserError(f"{name} has the processor {processor}; those served are {', '.join(_PROCESSORS)}")
        if parts := _unserved_parts(module):
            raise UserError(f"{name} has {', '.join(parts)}, which differential attention does not serve here")
    options: dict[str, Any] = {"ratio": ratio, "lambda_init": lambda_init, "sub_norm": sub_norm}
    processors = {name: DifferentialAttnProcessor(module, **options) for name, module in modules.items()}
    for name, module in modules.items():
        anything: Any = processors[name]
        module.set_processor(anything)
    configured: Any = model
    configured.register_to_config(**{CONFIG_KEY: options})
    return list(modules)


def load_patched(model_class: Any, folder: str | Path, **options: Any) -> Any:
    """A model that :func:`patch` changed, from what ``save_pretrained`` wrote.

    Args:
        model_class: its diffusers class.
        folder: what ``save_pretrained`` was given.
        **options: those of the class's ``from_pretrained``.

    Raises:
        UserError: the folder's model was not patched.
    """
    patched = model_class.load_config(folder).get(CONFIG_KEY)
    if patched is None:
        raise UserError(f"{folder}: its config says nothing of a patch; load it with {model_class.__name__} itself")

    def from_config(cls: Any, config: Any, **others: Any) -> Any:
        made = super(built, cls).from_config({k: v for k, v in config.items() if k != CONFIG_KEY}, **others)
        patch(made[0] if isinstance(made, tuple) else made, **patched)
        return made

    # from_pretrained fills what from_config builds: a class whose from_config patches.
    built: Any = type(model_class.__name__, (model_class,), {"from_config": classmethod(from_config)})
    model = built.from_pretrained(folder, **options)
    (model[0] if isinstance(model, tuple) else model).__class__ = model_class
    return model


def _unserved_parts(attn: Attention) -> list[str]:
    """What an attention has that the processor does not compute."""
    parts = [name for name in ("group_norm", "spatial_norm") if getattr(attn, name) is not None]
    parts += ["added keys and values without queries"] if _is_unet_s(attn) else []
    parts += ["no output projection"] if attn.to_out is None else []
    parts += ["fewer key/value heads than query heads"] if attn.inner_kv_dim != attn.inner_dim else []
    parts += ["fused projections"] if attn.fused_projections else []
    return parts


def _is_unet_s(attn: Attention) -> bool:
    return attn.to_k is None or (attn.add_k_proj is not None and getattr(attn, "add_q_proj", None) is None)


class DifferentialAttnProcessor(nn.Module):
    """Computes what ``AttnProcessor2_0`` and ``JointAttnProcessor2_0`` do, with noise heads.

    A module: the ``Attention`` that it is set on trains and saves it. The attention's own heads are
    the signal heads and keep their projections and norms; see
    :class:`~motifarch.integrations.shared_noise.SharedNoiseAttention`. Noise heads start as the
    first heads of their groups and, by default, lambda at 0: the function that it was.

    Args:
        attn: the attention that it is for.
        ratio: signal heads a noise head; divides the heads.
        lambda_init: the constant in lambda, at which it starts.
        sub_norm: normalise each head's output and scale it by ``1 - lambda_init``.

    Raises:
        ValueError: a ratio that does not divide the heads.
    """

    def __init__(self, attn: Any, *, ratio: int = 4, lambda_init: float = 0.0, sub_norm: bool = False) -> None:
        super().__init__()
        self.head_dim = attn.inner_dim // attn.heads
        new = {"device": attn.to_q.weight.device, "dtype": attn.to_q.weight.dtype}

        def queries(signal: nn.Linear, norm: nn.Module | None) -> NoiseQueries:
            heads, bias = (attn.heads, self.head_dim), signal.bias is not None
            noise = NoiseQueries(signal.in_features, *heads, ratio=ratio, bias=bias, norm=copy.deepcopy(norm), **new)
            noise.start_as(signal)
            return noise

        joint = getattr(attn, "add_q_proj", None) is not None
        self.noise_queries = queries(attn.to_q, attn.norm_q)
        self.context_noise_queries = queries(attn.add_q_proj, attn.norm_added_q) if joint else None
        self.attention = SharedNoiseAttention(self.head_dim, lambda_init=lambda_init, sub_norm=sub_norm, **new)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Any:
        """:meth:`forward`, with the signature that diffusers reads here."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention's output.

        Args:
            attn: the attention, whose projections and norms are used.
            hidden_states: (B, S, query_dim).
            encoder_hidden_states: (B, T, width): what keys and values are made of; in joint
                attention (Stable Diffusion 3) tokens that attend and are attended to, too.
            attention_mask: added to the logits, (B, 1, keys) as diffusers' models make it.
            temb: for spatial norms, which :func:`patch` refuses.

        Returns:
            (B, S, out_dim); with joint attention also that of encoder_hidden_states.

        Raises:
            ValueError: an image that is not tokens, fused projections, or a mask of joint
                attention, which diffusers' own drops.
        """
        if hidden_states.ndim != 3 or attn.fused_projections:
            problem = "projections are fused" if attn.fused_projections else f"shape {tuple(hidden_states.shape)}"
            raise ValueError(f"{problem}; this processor takes tokens (B, S, width) and separate projections")
        joint = self.context_noise_queries is not None and encoder_hidden_states is not None
        context = hidden_states if joint or encoder_hidden_states is None else encoder_hidden_states
        if context is encoder_hidden_states and attn.norm_cross is not None:
            context = attn.norm_encoder_hidden_states(context)
        q, k = self._heads(attn.to_q(hidden_states), attn.norm_q), self._heads(attn.to_k(context), attn.norm_k)
        heads: tuple[Tensor, ...] = q, k, self._heads(attn.to_v(context)), self.noise_queries(hidden_states)
        if joint:
            assert encoder_hidden_states is not None
            added = self._joint_heads(attn, encoder_hidden_states)
            heads = tuple(torch.cat(pair, dim=1) for pair in zip(heads, added, strict=True))
        if attention_mask is not None:
            if joint:
                raise ValueError("attention_mask: joint attention has none in diffusers either; leave it out")
            attention_mask = attn.prepare_attention_mask(attention_mask, k.shape[1], len(k))
            attention_mask = attention_mask.view(len(k), attn.heads, -1, k.shape[1])
        out = self.attention(*heads, mask=attention_mask, scale=attn.scale)
        of_context: Any = None
        if joint:
            out, of_context = out.tensor_split([hidden_states.shape[1]], dim=1)
            of_context = of_context if attn.to_add_out is None else attn.to_add_out(of_context)
        for module in attn.to_out:
            out = module(out)
        out = (out + hidden_states if attn.residual_connection else out) / attn.rescale_output_factor
        return (out, of_context) if joint else out

    def _joint_heads(self, attn: Any, context: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values and noise queries of joint attention's second kind of tokens."""
        assert self.context_noise_queries is not None
        q = self._heads(attn.add_q_proj(context), attn.norm_added_q)
        k = self._heads(attn.add_k_proj(context), attn.norm_added_k)
        return q, k, self._heads(attn.add_v_proj(context)), self.context_noise_queries(context)

    def _heads(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """(B, S, heads * D) as (B, S, heads, D), normalised."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return x if norm is None else norm(x)  # type: ignore[no-any-return]
