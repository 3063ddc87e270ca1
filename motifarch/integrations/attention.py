"""The attention function of patched models, and what calls the kernels for it."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from motif_kernels import diff_attn_func, diff_attn_varlen_func, diff_attn_with_kvcache
from motif_kernels.ops import is_exporting
from motif_kernels.types import AttentionInputs, AttentionOptions
from motifarch.forward_arguments import check_arguments
from motifarch.integrations.masks import VisibleKeys, visible_keys
from motifarch.layers import PaddingMask
from motifarch.layers.attention_maps import attend_by_maps
from motifarch.layers.head_norm import attend_normed
from motifarch.layers.padding import PackedTokens

IMPLEMENTATION = "motifarch_differential"
"""The patched models' ``config._attn_implementation``."""


def differential_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: VisibleKeys | None,
    *,
    differential_lambda: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of patched models, in the shape that transformers calls.

    Args:
        module: a patched attention module.
        query: (B, H + Hn, S, D), signal heads before noise heads, normalised and rotated.
        key: (B, Hk, Sk, D), those of a cache included.
        value: (B, Hk, Sk, D).
        attention_mask: what :func:`motifarch.integrations.masks.visible_keys` made of the model's
            mask.
        differential_lambda: a scalar tensor or (B, S, H).
        **options: those of :func:`attend_heads`, ``scaling`` among them.

    Returns:
        (B, S, H, D), and None for the attention maps.

    Raises:
        ValueError: the module was not patched, and what :func:`attend_heads` raises.
    """
    if differential_lambda is None:
        raise ValueError(f"{IMPLEMENTATION!r} serves patched attention modules only; {type(module).__name__} is none")
    query, key, value = as_kernels_take(query, key, value)
    signal, noise = query.split([module.signal_heads, module.noise_heads], dim=2)
    heads = (signal, key, noise, key, value)
    return attend_heads(module, heads, differential_lambda, attention_mask, **options), None


def as_kernels_take(*tensors: Tensor) -> list[Tensor]:
    """(B, heads, S, width) of transformers as (B, S, heads, width), in autocast's dtype."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        tensors = tuple(t.to(torch.get_autocast_dtype(t.device.type)) for t in tensors)
    return [t.transpose(1, 2) for t in tensors]


def attend_heads(
    module: Any,
    heads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    lam: Tensor,
    attention_mask: VisibleKeys | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **others: Any,
) -> Tensor:
    """Differential attention of heads that a module's projections gave, with what transformers says
    of the call.

    Args:
        module: has ``subln`` (or None), ``out_scale`` and ``backend``.
        heads: q1, k1, q2, k2 and v, (B, S, heads, width); k1 and k2 may be the same tensor.
        lam: a scalar tensor or (B, S, Hs).
        attention_mask: what :func:`motifarch.integrations.masks.visible_keys` made of the model's
            mask.
        scaling: multiplies the logits.
        dropout: must be 0.
        sliding_window: w, keys that a query sees, its own included (on either side, where it sees
            both); None for all.
        softcap: soft cap of the logits.
        is_causal: as the module's ``is_causal``, which it goes before; a mask goes before both.
        cu_seq_lens_q: bounds of packed documents, where the caller gives them.
        max_length_q: the longest of those.
        **others: what :func:`motifarch.forward_arguments.check_arguments` accepts.

    Returns:
        (B, S, Hs, Dv).

    Raises:
        ValueError: a mask of another kind, dropout, gradients through a padded cache, or another
            argument that would change the result.
    """
    others.pop("ignore_index", None)  # of the host's loss
    check_arguments(others, cu_seq_lens_q, max_length_q)
    if others.get("output_attentions"):
        raise ValueError("output_attentions is on, but this attention keeps no maps; leave it out")
    if dropout:
        raise ValueError(f"attention dropout is {dropout}, which differential attention does not have; set it to 0")
    if isinstance(attention_mask, VisibleKeys) and attention_mask.window not in (None, sliding_window):
        raise ValueError(
            f"the model's mask has a window of {attention_mask.window} tokens, but its attention was called with "
            f"sliding_window={sliding_window}; a model that keeps its window in the mask alone is not served"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if isinstance(attention_mask, VisibleKeys) and attention_mask.causal is not None:
        causal = attention_mask.causal
    beside = -1 if sliding_window is None else sliding_window - 1
    options = {
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": (beside, 0 if causal and beside >= 0 else beside),
        "softcap": softcap or 0.0,
        "backend": module.backend,
    }
    hidden = VisibleKeys() if attention_mask is None else attention_mask
    if cu_seq_lens_q is not None and isinstance(hidden, VisibleKeys) and not hidden.tokens_are_hidden:
        if max_length_q is None:
            raise ValueError("cu_seq_lens_q was given without max_length_q; give both for packed documents")
        attention_mask = replace(hidden, documents=(cu_seq_lens_q, int(max_length_q)))
    return attend_normed(module.subln, module.out_scale, (*heads, lam), partial(_attend, attention_mask, options))


def _attend(visible: Any, options: dict[str, Any], inputs: Any, **epilogue: Any) -> Any:
    """Attention of (B, S, heads, width) tensors and lambda, by the kernels that suit the mask."""
    *heads, lam = inputs
    q1, k1, q2, k2, v = heads
    options = options | epilogue
    if visible is None:
        return diff_attn_func(q1, k1, q2, k2, v, lam, **options)
    if isinstance(visible, Tensor) and is_exporting():
        numbers = {name: options[name] for name in ("softmax_scale", "softcap", "norm_eps", "out_scale")}
        inputs = AttentionInputs(q1, k1, q2, k2, v, lam, options["norm_weight"])
        return attend_by_maps(inputs, visible, AttentionOptions.of(q1.shape[-1], **numbers)).output
    if not isinstance(visible, VisibleKeys):
        raise ValueError(
            "attention_mask is a mask of every query and key; a patched model's attention takes masks of padding, "
            "(B, tokens)"
        )
    places, padding = k1.shape[1], visible.padding
    if visible.lengths is not None:
        if not (torch.is_grad_enabled() and (q1.requires_grad or k1.requires_grad)):
            options |= {"cache_leftpad": visible.leftpad}
            return diff_attn_with_kvcache(q1, k1, q2, k2, v, lam, visible.lengths, **options)
        if not visible.full:
            raise ValueError("a cache of fixed size gives no gradients; call under torch.no_grad(), or without a cache")
        if visible.leftpad is None:
            return diff_attn_func(q1, k1, q2, k2, v, lam, **options)
        padding = PaddingMask(torch.arange(places, device=k1.device) >= visible.leftpad[:, None], q1.shape[1])
    if padding is None and visible.documents is None:
        return diff_attn_func(q1, k1, q2, k2, v, lam, **options)
    return _attend_packed(heads, lam, visible.documents if padding is None else padding.pack(places), options)


def _attend_packed(heads: Any, lam: Tensor, packed: Any, options: dict[str, Any]) -> Any:
    """Attention of packed documents, or of the real tokens of a padded batch."""
    out: Any
    batch, length = heads[0].shape[:2]
    shared = heads[1] is heads[3]
    q1, k1, q2, k2, v = (t.flatten(0, 1) for t in heads)
    lam = lam.flatten(0, 1) if lam.ndim else lam
    if not isinstance(packed, PackedTokens):
        bounds, longest = packed
        k2 = k1 if shared else k2
        out = diff_attn_varlen_func(q1, k1, q2, k2, v, lam, bounds, bounds, longest, longest, **options)
        return out.unflatten(0, (batch, length))
    queries, keys, *bounds = packed
    q1, q2, k1, v = q1[queries], q2[queries], k1[keys], v[keys]
    k2 = k1 if shared else k2[keys]
    lam = lam[queries] if lam.ndim else lam
    out = diff_attn_varlen_func(q1, k1, q2, k2, v, lam, *bounds, **options)
    return out.new_zeros(batch * length, *out.shape[1:]).index_copy(0, queries, out).unflatten(0, (batch, length))


AttentionInterface.register(IMPLEMENTATION, differential_attention)
AttentionMaskInterface.register(IMPLEMENTATION, visible_keys)
