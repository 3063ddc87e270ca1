"""What a cache and a mask say of a call: tokens before it, and which are padding."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from motif_kernels.ops import is_exporting
from motifarch.layers import PaddingMask
from motifarch.models.motif.configuration_motif import MotifConfig


def seen_tokens(past_key_values: Cache | None, num_new: int) -> int | Tensor:
    """Tokens that a cache holds: a number, or a scalar tensor where reading it would stall the
    device.

    Raises:
        ValueError: a cache of fixed size has no room for ``num_new`` more (where the count may be
            read), or a program is traced that would not count its tokens.
    """
    if past_key_values is None:
        return 0
    if is_exporting() and past_key_values.is_compileable and not torch.compiler.is_dynamo_compiling():
        raise ValueError(
            f"a {type(past_key_values).__name__} would be a constant of the exported program, which would forget its "
            "tokens: export with strict=True, with a DynamicCache, or with use_cache=False"
        )
    seen: Any = past_key_values.get_seq_length()
    if isinstance(seen, Tensor):
        if torch.compiler.is_compiling() or (seen.is_cuda and num_new == 1):
            return seen.clone()  # a static cache counts in place
        seen = int(seen)
    if is_exporting():
        return seen  # a symbol, which to read would make a constant
    layers: list[Any] = past_key_values.layers
    room = getattr(layers[0], "max_cache_len", None) if layers else None
    if room is not None and not layers[0].is_sliding and seen + num_new > room:
        raise ValueError(
            f"the {type(past_key_values).__name__} has room for {room} tokens in a row, but {seen} are cached and "
            f"{num_new} are to be added; make it larger (max_cache_len)"
        )
    return int(seen)


def fit_windows(past_key_values: Cache | None, config: MotifConfig) -> None:
    """Gives a new cache room for the window of latent attention: transformers counts sliding_window
    with the query's own token, and Motif-3 has one more.

    Raises:
        ValueError: a window's cache that holds tokens already, and has dropped one too many.
    """
    if past_key_values is None or not config.is_latent or config.sliding_window is None:
        return
    layers: list[Any] = past_key_values.layers
    for i, layer in enumerate(layers):
        size = getattr(layer, "sliding_window", getattr(layer, "max_cache_len", None))
        if not layer.is_sliding or size != config.sliding_window:
            continue
        if layer.is_initialized:
            raise ValueError(
                f"layer {i} of the {type(past_key_values).__name__} keeps a window of {size} tokens, with the query's "
                f"own; this model's is {size + 1}: let the model make its cache, or give it an empty one"
            )
        if isinstance(layer, DynamicSlidingWindowLayer):
            layers[i] = DynamicSlidingWindowLayer(sliding_window=size + 1)
            layers[i].record_past = layer.record_past
        else:
            layer.max_cache_len += 1


class AttentionMask(NamedTuple):
    """What a mask over all tokens asks for, in the words of the attention layers; at most one."""

    padding: PaddingMask | None = None
    leftpad: Tensor | None = None
    """Of a cache that goes on after padding on the left, how much: (B,) int32."""
    visible: Tensor | None = None
    """Which places each token sees, (B, 1, S, places)."""


def read_attention_mask(
    attention_mask: Tensor,
    batch: int,
    num_new: int,
    seen: int | Tensor,
    past_key_values: Cache | None,
    window_size: tuple[int, int],
    layer_idx: int = 0,
) -> AttentionMask:
    """What a mask asks for: one over all tokens, (B, seen + num_new), 0 for padding; or one that
    says itself what each token sees, (B or 1, 1 or heads, num_new, places).

    The window is that of layer ``layer_idx`` and those like it.

    Raises:
        ValueError: a mask of another shape, or padding for which a window's cache dropped tokens.
    """
    if attention_mask.ndim == 4:
        is_choice = attention_mask.is_floating_point() or attention_mask.dtype == torch.bool
        return AttentionMask(visible=attention_mask if is_choice else attention_mask.bool())
    real = attention_mask.bool()
    if is_exporting():  # nothing is read
        return AttentionMask(padding=PaddingMask(real, num_new))
    total = int(seen) + num_new
    if tuple(attention_mask.shape) != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {(batch, total)}: "
            f"{total - num_new} cached and {num_new} new tokens in each of {batch} rows"
        )
    if bool(real.all()):
        return AttentionMask()
    if past_key_values is None or total == num_new:
        return AttentionMask(padding=PaddingMask(real, num_new))
    if left_only(real) and not torch.is_grad_enabled():
        return AttentionMask(leftpad=padding_on_the_left(real))
    if past_key_values.is_compileable:
        return AttentionMask(visible=visible_places(real, num_new, past_key_values, window_size, layer_idx))
    _places(real, num_new, past_key_values, window_size, layer_idx)
    return AttentionMask(padding=PaddingMask(real, num_new))


def left_only(mask: Tensor) -> bool:
    """Whether a mask (B, S) has no padding behind real tokens."""
    real = mask.bool()
    return not bool((real[:, :-1] & ~real[:, 1:]).any())


def padding_on_the_left(mask: Tensor) -> Tensor:
    """How much of it, (B,) int32, in a mask (B, S) that has no other."""
    return (mask == 0).sum(dim=1, dtype=torch.int32)


def visible_places(
    mask: Tensor, num_new: int, past_key_values: Cache, window_size: tuple[int, int], layer_idx: int = 0
) -> Tensor:
    """Which places of a static cache each new token sees, (B, 1, num_new, places): one shape for
    all lengths.

    Args:
        mask: (B, total), 0 for padding, wherever it is.
        num_new: the last of its columns.
        past_key_values: the cache.
        window_size: of the layers that it is for.
        layer_idx: one of them.
    """
    real, total = mask.bool(), mask.shape[1]
    places, dropped = _places(real, num_new, past_key_values, window_size, layer_idx)
    keys = real.cumsum(dim=1)  # real tokens are neighbours
    queries, keys, real = keys[:, -num_new:, None], keys[:, None, dropped:], real[:, None, dropped:]
    visible = real & (keys <= queries)
    if window_size[0] >= 0:
        visible &= keys >= queries - window_size[0]
    return nn.functional.pad(visible, (0, places - (total - dropped)))[:, None]


def _places(
    real: Tensor, num_new: int, past_key_values: Cache, window_size: tuple[int, int], layer_idx: int
) -> tuple[int, int]:
    """How many places a cache will show to the last ``num_new`` of a mask's tokens (B, total), and
    how many tokens it dropped before these: a window's cache keeps the last ones, padding too.

    Raises:
        ValueError: a token that was dropped is in the window of a new one.
    """
    places, dropped = past_key_values.get_mask_sizes(num_new, layer_idx)
    kept = real[:, dropped:-num_new].sum(dim=1)
    if dropped and bool((real[:, :dropped].any(dim=1) & (kept < window_size[0])).any()):
        raise ValueError(
            f"attention_mask has padding behind real tokens, and the {type(past_key_values).__name__} kept the padding "
            f"in their place, for it holds a window of {window_size[0] + 1}: pad prompts on the left "
            "(tokenizer.padding_side = 'left'), or take DynamicCache(), which holds everything"
        )
    return places, dropped


def visible_documents(position_ids: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Which keys each token of packed rows sees, (B, 1, S, S).

    Args:
        position_ids: (B, S), which restart at each document.
        window_size: of the model.
    """
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    document, place = starts.cumsum(dim=1), torch.arange(position_ids.shape[1], device=position_ids.device)
    ahead = place[None, :] - place[:, None]
    visible = (document[:, :, None] == document[:, None]) & (ahead <= 0)
    return (visible & (ahead >= -window_size[0]) if window_size[0] >= 0 else visible)[:, None]
