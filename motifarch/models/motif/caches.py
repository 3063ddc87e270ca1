"""What a cache and a mask say of a call: tokens before it, and which are padding."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from motifarch.layers import PaddingMask


def seen_tokens(past_key_values: Cache | None, num_new: int) -> int | Tensor:
    """Tokens that a cache holds: a number, or a scalar tensor where reading it would stall the
    device.

    Raises:
        ValueError: a cache of fixed size has no room for ``num_new`` more (where the count may be
            read).
    """
    if past_key_values is None:
        return 0
    seen: Any = past_key_values.get_seq_length()
    if isinstance(seen, Tensor):
        if torch.compiler.is_compiling() or (seen.is_cuda and num_new == 1):
            return seen.clone()  # a static cache counts in place
        seen = int(seen)
    layers: list[Any] = past_key_values.layers
    room = getattr(layers[0], "max_cache_len", None) if layers else None
    if room is not None and not layers[0].is_sliding and seen + num_new > room:
        raise ValueError(
            f"the {type(past_key_values).__name__} has room for {room} tokens in a row, but {seen} are cached and "
            f"{num_new} are to be added; make it larger (max_cache_len)"
        )
    return int(seen)


def read_attention_mask(
    attention_mask: Tensor, batch: int, num_new: int, seen: int | Tensor, past_key_values: Cache | None
) -> tuple[PaddingMask | None, Tensor | None]:
    """What a mask (B, seen + num_new) over all tokens, 0 for padding, asks for.

    Returns:
        What to pack, or None; and for a cache that goes on after padding on the left, how much,
        (B,) int32, or None.

    Raises:
        ValueError: a mask of another shape, or padding that is not on the left in a cache of fixed
            size.
    """
    total = int(seen) + num_new
    if tuple(attention_mask.shape) != (batch, total):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it must be {(batch, total)}: "
            f"{total - num_new} cached and {num_new} new tokens in each of {batch} rows"
        )
    real = attention_mask.bool()
    if bool(real.all()):
        return None, None
    if past_key_values is None:
        return PaddingMask(real, num_new), None
    left_only = not bool((real[:, :-1] & ~real[:, 1:]).any())
    if past_key_values.is_compileable and not left_only:
        raise ValueError(
            f"attention_mask has padding behind real tokens, which a {type(past_key_values).__name__} cannot hold: pad "
            "prompts on the left (tokenizer.padding_side = 'left'), or take a DynamicCache"
        )
    if left_only and total > num_new and not torch.is_grad_enabled():
        return None, (~real).sum(dim=1, dtype=torch.int32)
    return PaddingMask(real, num_new), None
