"""Which keys a call sees: its mask, read for kernels that take bounds instead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from motif_kernels.ops import is_exporting
from motifarch.layers import PaddingMask


@dataclass(frozen=True)
class VisibleKeys:
    """What hides keys besides a layer's order and window: padding, documents or lengths, or none of
    these.

    Args:
        causal: a token sees none after it; None where the layer says it.
        padding: which tokens of a padded batch are real.
        documents: (documents + 1,) int32 bounds of packed documents in the B * S tokens, and the
            longest one's length.
        lengths: (B,) int32, how many of a cache's places are filled, the new tokens included.
        leftpad: with lengths: (B,) int32, how many places at their start are padding.
        full: with lengths: every place of the cache is filled, as far as the host knows.
        window: tokens that the mask lets a token see on one side, itself included: what the layer's
            attention must be told, too; None for all.
    """

    causal: bool | None = None
    padding: PaddingMask | None = None
    documents: tuple[Tensor, int] | None = None
    lengths: Tensor | None = None
    leftpad: Tensor | None = None
    full: bool = False
    window: int | None = None

    @property
    def tokens_are_hidden(self) -> bool:
        """Besides order and window."""
        return any(hidden is not None for hidden in (self.padding, self.documents, self.lengths))


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    config: Any = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> VisibleKeys | Tensor | None:
    """The mask function of patched models, which transformers calls once for each kind of layer,
    with its own mask functions' arguments.

    ``kv_length`` counts the keys that the layers will get: the S new ones and what their cache
    holds. ``q_offset`` are the tokens before the first new one (a scalar tensor with a static
    cache), ``kv_offset`` those before the first key (a sliding-window cache drops the oldest).
    ``attention_mask`` is (B, q_offset + S) bool, False for padding. ``mask_function`` may say what
    a layer's window does, which the layer's attention is told too, and where documents begin.

    Returns:
        None where causal order and window say it all. Where the model is exported, a mask of every
        query and key, (B, 1, S, keys) bool, window included.

    Raises:
        ValueError: a mask that kernels with bounds cannot honour: neither causal nor of both sides,
            of another shape, or padding between real tokens.
    """
    if is_exporting():  # nothing may be read, and nothing that is plain need be fast
        if isinstance(q_offset, Tensor) and not torch.compiler.is_dynamo_compiling():
            raise ValueError(
                "a cache of fixed size would be a constant of the exported program, which would forget its tokens: "
                "export with strict=True, or with use_cache=False"
            )
        arguments: dict[str, Any] = {  # its offset is typed as a number
            "q_length": q_length,
            "kv_length": kv_length,
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "mask_function": mask_function,
            "attention_mask": attention_mask,
            "local_size": local_size,
        }
        return sdpa_mask(batch_size, **arguments, allow_is_causal_skip=False, use_vmap=use_vmap, device=device)
    if use_vmap:
        raise ValueError("the model adds a mask function of its own to the causal mask, which is not served")
    if local_size is not None and local_size == getattr(config, "attention_chunk_size", None):
        raise ValueError(f"the model's attention is in chunks of {local_size} tokens, which is not served")
    plain = mask_function is causal_mask_function or mask_function is bidirectional_mask_function
    at_start = isinstance(q_offset, int) and q_offset == 0
    by_values = (q_length > 1 and not plain) or (at_start and attention_mask is not None)
    read = _read_between_graphs if by_values and torch.compiler.is_compiling() else _read
    return read(mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask, device, local_size)


def _read(
    mask_function: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor,
    kv_offset: int,
    attention_mask: Tensor | None,
    device: torch.device | str,
    local_size: int | None,
) -> VisibleKeys | None:
    """What :func:`visible_keys` gives, of its arguments."""
    if not _is_causal(mask_function, batch_size, q_length, q_offset, device):
        if not (isinstance(q_offset, int) and q_offset == 0):
            raise ValueError("the model's mask lets tokens see later ones, which is not served with a cache")
        return _both_sides(mask_function, q_length, kv_length, attention_mask, local_size)
    at_start = isinstance(q_offset, int) and q_offset == 0 and kv_length == q_length
    if attention_mask is not None:
        attention_mask = _checked(attention_mask, q_offset, q_length)
    if at_start:
        if attention_mask is not None:
            return VisibleKeys(padding=PaddingMask(attention_mask, q_length), window=local_size)
        documents = _documents(mask_function, batch_size, q_length, device)
        return VisibleKeys(documents=documents, window=local_size) if documents or local_size else None
    added = q_length - kv_offset
    if isinstance(q_offset, Tensor):
        lengths = (q_offset.to(device=device, dtype=torch.int32) + added).expand(batch_size).contiguous()
    else:
        lengths = torch.full((batch_size,), q_offset + added, dtype=torch.int32, device=device)
    leftpad = None
    if attention_mask is not None:
        before = (attention_mask.cumsum(dim=1) == 0).sum(dim=1, dtype=torch.int32)
        leftpad = (before - kv_offset).clamp(min=0)
    full = isinstance(q_offset, int) and q_offset + added == kv_length
    return VisibleKeys(lengths=lengths, leftpad=leftpad, full=full, window=local_size)


@torch.compiler.disable
def _read_between_graphs(
    mask_function: Callable[..., Any], batch_size: int, q_length: int, kv_length: int, *others: Any
) -> VisibleKeys | None:
    """The same where the mask's values decide: the compiler's graph ends here, and the layers are
    one graph, for which padding is packed now.
    """
    visible = _read(mask_function, batch_size, q_length, kv_length, *others)
    if visible is not None and visible.padding is not None:
        visible.padding.pack(kv_length)
    return visible


def _checked(mask: Tensor, q_offset: int | Tensor, q_length: int) -> Tensor | None:
    """The mask (B, tokens), or None if it hides nothing."""
    if isinstance(q_offset, int) and mask.shape[1] != q_offset + q_length:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must have {q_offset + q_length} columns: {q_offset} "
            f"cached and {q_length} new tokens"
        )
    # In a row with padding on either side, or both, real tokens begin once.
    begins = mask[:, :1].sum(dim=1) + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
    fits = (begins <= 1).all()
    if not isinstance(q_offset, int) or q_offset > 0:
        fits = fits & mask[:, -1].all()
    message = (
        "attention_mask has padding between or, with a cache, behind real tokens, which a patched model's attention "
        "cannot hide: pad on the left (tokenizer.padding_side = 'left')"
    )
    if torch.compiler.is_compiling():
        torch._assert_async(fits, message)
        return mask
    if not bool(fits):
        raise ValueError(message)
    return None if bool(mask.all()) else mask


def _is_causal(
    mask_function: Callable[..., Any], batch: int, length: int, q_offset: int | Tensor, device: torch.device | str
) -> bool:
    """Whether no token sees the one after it, or all do; raises for what is between, as the blocks
    of images are.
    """
    if mask_function is bidirectional_mask_function:
        return False
    if mask_function is causal_mask_function or length == 1:
        return True
    rows, places = torch.arange(batch, device=device)[:, None], torch.arange(length - 1, device=device)[None] + q_offset
    seen = mask_function(rows, 0, places, places + 1)
    if bool(seen.all()):
        return False
    if bool(seen.any()):
        raise ValueError("the model's mask lets tokens see later ones, but not all, which this attention cannot")
    return True


def _both_sides(
    mask_function: Callable[..., Any], queries: int, keys: int, attention_mask: Tensor | None, window: int | None
) -> VisibleKeys:
    """What a mask of both sides hides; ``window`` are tokens beside the own one, on either side."""
    if attention_mask is not None:
        attention_mask = _checked(attention_mask, 0, keys)
    if attention_mask is not None and queries != keys:
        raise ValueError(
            "attention_mask hides keys of another sequence (cross-attention), which this attention cannot hide; leave "
            "it out, or cut the padding off"
        )
    if window is not None and mask_function is not bidirectional_mask_function:
        here, near, far = torch.tensor([0]), torch.tensor([window]), torch.tensor([window + 1])
        pairs = ((here, near, True), (near, here, True), (here, far, False), (far, here, False))
        if any(bool(mask_function(here, 0, q, k).all()) is not seen for q, k, seen in pairs):
            raise ValueError(f"the model's mask is no window of {window} tokens on either side, which alone is served")
    padding = None if attention_mask is None else PaddingMask(attention_mask, queries)
    return VisibleKeys(causal=False, padding=padding, window=None if window is None else window + 1)


def _documents(
    mask_function: Callable[..., Any], batch: int, length: int, device: torch.device | str
) -> tuple[Tensor, int] | None:
    """Bounds (documents + 1,) int32 and longest: a token that does not see the last starts one."""
    if mask_function is causal_mask_function or length < 2:
        return None
    rows = torch.arange(batch, device=device)[:, None]
    places = torch.arange(1, length, device=device)[None]
    joined = mask_function(rows, 0, places, places - 1).expand(batch, -1)
    if bool(joined.all()):
        return None
    starts = torch.nn.functional.pad(~joined, (1, 0), value=True).flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(starts, (0, 1), value=batch * length).int()
    return bounds, int(bounds.diff().max())
