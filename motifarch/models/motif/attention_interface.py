"""Transformers' attention interface under the Motif models: any attention that is registered there.

All query heads, signal and noise, go through one call, and the layers take the difference of what
it gives. Continuous batching comes with a cache of its own, which is updated here.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from motifarch.layers.base_attention import BaseAttention
from motifarch.models.motif.configuration_motif import FULL, WINDOW, MotifConfig

_PAGED = "paged|"  # what transformers puts before the name of an attention that takes continuous batching's cache

# Arguments of continuous batching that attention reads.
_SERVED = (
    *("cache", "read_index", "write_index", "block_table", "is_causal"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
)


def is_registered(name: str) -> bool:
    """Whether the interface has an attention of this name."""
    return name in AttentionInterface().valid_keys()


class InterfaceAttention:
    """The interface in one pass of a model, for all its layers.

    Args:
        config: the model's; its attn_implementation names the attention.
        hidden_states: (B, S, E), the layers' first input.
        attention_mask: (B, cached + S), 0 for padding, or four dimensions, as the attention named
            takes them.
        position_ids: (B or 1, S), which restart at packed documents.
        past_key_values: a transformers Cache, or None.
        served: arguments of continuous batching, or none of them.
    """

    def __init__(
        self,
        config: MotifConfig,
        hidden_states: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor,
        past_key_values: Cache | None,
        served: dict[str, Any],
    ) -> None:
        self._config = config
        self._mask: Any = attention_mask
        self._options = {"position_ids": position_ids, **{name: served[name] for name in _SERVED if name in served}}
        if not is_served(served):
            makers: dict[str, Any] = {FULL: create_causal_mask, WINDOW: create_sliding_window_causal_mask}
            self._mask = {
                config.window_of(kind): makers[kind](
                    config, hidden_states, attention_mask, past_key_values, position_ids=position_ids
                )
                for kind in set(config.layer_types)
            }

    def __call__(self, layer: BaseAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries (B, S, H, D), keys and values (B, keys, Hk, D) -> (B, S, H, Dv)."""
        options = dict(self._options)  # a paged cache notes there what it holds for the layer
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        cache = options.pop("cache", None)
        if cache is not None:
            key, value = _update_paged(cache, layer, key, value, options)
        config = self._config
        name = str(config._attn_implementation).removeprefix(_PAGED)  # its cache is up to date
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, _plain_attention)
        scale = layer.head_dim**-0.5 if layer.softmax_scale is None else layer.softmax_scale
        window = None if layer.window_size[0] < 0 else layer.window_size[0] + 1
        mask = self._mask[layer.window_size] if isinstance(self._mask, dict) else self._mask
        out, _ = attend(layer, query, key, value, mask, dropout=0.0, scaling=scale, sliding_window=window, **options)
        return out.reshape(query.shape[0], query.shape[2], -1, value.shape[-1])


def is_served(options: dict[str, Any]) -> bool:
    """Whether a call is continuous batching's, which brings its own cache and masks."""
    return options.get("cache") is not None


def positions_in_documents(cu_seqlens: Tensor, batch: int, seqlen: int) -> Tensor:
    """Positions (B, S) that restart at each packed document, of bounds (documents + 1,)."""
    bounds, place = cu_seqlens.long(), torch.arange(batch * seqlen, device=cu_seqlens.device)
    return (place - bounds[torch.searchsorted(bounds, place, right=True) - 1]).view(batch, seqlen)


def _update_paged(
    cache: Any, layer: BaseAttention, key: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Keys and values (1, Hk, S, width) with those that a paged cache holds, in heads of the
    config's head_dim.
    """
    width = key.shape[-1]
    key, value = cache.update(
        key_states=_cut(key, layer.head_dim),
        value_states=_cut(value, layer.head_dim),
        layer_idx=layer.layer_idx,
        kwargs=options,
    )
    for name in ("k_cache", "v_cache"):  # of a kernel that writes into it: a view, never a copy
        if options.get(name) is not None:
            options[name] = options[name].view(*options[name].shape[:-2], -1, width)
    return _cut(key, width), _cut(value, width)


def _cut(heads: Tensor, width: int) -> Tensor:
    """Heads (B, H, S, D), cut or joined into heads of another width."""
    return heads.transpose(1, 2).flatten(2).unflatten(-1, (-1, width)).transpose(1, 2)


def _plain_attention(
    layer: BaseAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by maps, with a mask that is added: "eager", as continuous batching has it."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    logits = logits if mask is None else logits + mask
    return (logits.float().softmax(dim=-1).to(query.dtype) @ value).transpose(1, 2), None
