"""Attention by maps that exist whole, to look at them; and what masks say.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hs signal heads, Dv width of a value.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.reference import attention_map, diff_combine, weigh_values
from motif_kernels.types import AttentionInputs, AttentionOptions, Cache, Sequences
from motifarch.layers.padding import PaddingMask


class WithMaps(NamedTuple):
    """What :func:`attend_by_maps` gives."""

    output: Tensor
    """(B, Sq, Hs, Dv)."""
    maps: Tensor
    """Softmax probabilities of all query heads, signal and noise as q_proj has them, (B, H, Sq, Sk)
    in float32 (float64).
    """
    max_logits: list[Tensor]
    """Largest unmasked logits, of the signal heads and of the noise heads if there are any."""


def attend_by_maps(inputs: AttentionInputs, mask: Tensor, options: AttentionOptions, dropout: float = 0.0) -> WithMaps:
    """Attention of (B, S, heads, width) tensors, in the formulas' own order; the output depends on
    the very maps that are returned, so that gradients reach them.

    Args:
        inputs: of a batch.
        mask: what broadcasts to (B, H, Sq, Sk): bool, True where a query sees a key; or floats that
            are added to the logits.
        options: all but the window, which the mask has.
        dropout: the share of each map's probabilities that are left out.
    """
    scale = {"softmax_scale": options.softmax_scale, "softcap": options.softcap}
    of_signal, of_noise = signal_and_noise_masks(mask, inputs.noise_heads)
    signal, largest = attention_map(inputs.q1, inputs.k1, mask=of_signal, **scale)
    signal = F.dropout(signal, dropout)
    maps, noise, max_logits = signal, None, [largest]
    if inputs.noise is not None:
        noise, largest = attention_map(inputs.noise.q, inputs.noise.k, mask=of_noise, **scale)
        max_logits.append(largest)
        noise = F.dropout(noise, dropout)
        blocks = signal.unflatten(1, (inputs.noise_heads, -1))
        maps = torch.cat((blocks, noise[:, :, None]), dim=2).flatten(1, 2)
        signal, noise = _signal_and_noise(maps, inputs.noise_heads)
    out = diff_combine(
        weigh_values(signal, inputs.v),
        None if noise is None else weigh_values(noise, inputs.v),
        inputs.lam,
        norm_weight=inputs.norm_weight,
        norm_eps=options.norm_eps,
        out_scale=options.out_scale,
        gate=inputs.gate,
    )
    return WithMaps(out.to(inputs.q1.dtype), maps, max_logits)


def signal_and_noise_masks(mask: Tensor, noise_heads: int) -> tuple[Tensor, Tensor]:
    """A mask's parts for signal and noise heads: two where it has heads, as q_proj does."""
    return _signal_and_noise(mask, noise_heads) if noise_heads and mask.shape[1] > 1 else (mask, mask)


def _signal_and_noise(heads: Tensor, noise_heads: int) -> tuple[Tensor, Tensor]:
    """(B, H, ...) as q_proj has the heads, to (B, Hs, ...) and (B, Hn, ...)."""
    blocks = heads.unflatten(1, (noise_heads, -1))
    return blocks[:, :, :-1].flatten(1, 2), blocks[:, :, -1]


def read_mask(mask: Tensor, inputs: AttentionInputs) -> Tensor:
    """A mask of the caller's own, as (B or 1, H or 1, Sq, Sk).

    Raises:
        ValueError: it does not broadcast to (B, H, Sq, Sk), or is neither bool nor floats.
    """
    (rows, tokens), keys = inputs.q1.shape[:2], inputs.k1.shape[1]
    heads = inputs.q1.shape[2] + inputs.noise_heads
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"attn_mask is of {mask.dtype}; give bool, True where a token sees a key, or floats that are added to "
            "the logits"
        )
    given = mask[None, None] if mask.ndim == 2 else mask
    sizes = (rows, heads, tokens, keys)
    if given.ndim != 4 or any(size not in (1, full) for size, full in zip(given.shape, sizes, strict=True)):
        raise ValueError(
            f"attn_mask has shape {tuple(mask.shape)}; it must be ({tokens} tokens, {keys} keys) or broadcast to "
            f"({rows} rows, {heads} heads, {tokens} tokens, {keys} keys)"
        )
    return given.expand(-1, -1, tokens, keys)


def visible_keys(
    inputs: AttentionInputs, batch: Sequences | PaddingMask | Cache | None, window_size: tuple[int, int]
) -> Tensor:
    """Which keys each query of a call sees: bool (1 or B, 1, Sq, Sk).

    Args:
        inputs: of a batch, whose rows may hold packed documents.
        batch: what its tokens are.
        window_size: inclusive (left, right), -1 for unbounded; (-1, 0) is causal.
    """
    (rows, num_queries), num_keys, device = inputs.q1.shape[:2], inputs.k1.shape[1], inputs.q1.device
    keys = torch.arange(num_keys, device=device)[None]
    queries = keys[:, max(num_keys - num_queries, 0) :]
    seen = torch.ones(1, 1, 1, dtype=torch.bool, device=device)
    if isinstance(batch, Cache):
        queries = batch.lengths[:, None] - num_queries + torch.arange(num_queries, device=device)
        if batch.leftpad is not None:
            seen = (keys >= batch.leftpad[:, None])[:, None]
    elif isinstance(batch, PaddingMask):
        real, real_queries = batch.mask[:, -num_keys:], batch.queries[:, :, None]
        keys = real.cumsum(dim=1)  # real tokens are neighbours
        queries = keys[:, -num_queries:]
        empty = num_keys - real.shape[1]  # places of a static cache behind the tokens
        keys, real = F.pad(keys, (0, empty)), F.pad(real, (0, empty))
        seen = real[:, None] & real_queries
    elif batch is not None:
        assert batch.cu_seqlens_k is not None  # a batch without documents is None
        tokens = torch.arange(rows * num_keys, device=device, dtype=torch.int32)
        document = torch.searchsorted(batch.cu_seqlens_k[1:], tokens, right=True).view(rows, num_keys)
        seen = document[:, None] == document[:, :, None]
    left, right = window_size
    if left >= 0:
        seen = seen & (keys[:, None] - queries[:, :, None] >= -left)
    if right >= 0:
        seen = seen & (keys[:, None] - queries[:, :, None] <= right)
    return seen.expand(-1, num_queries, num_keys)[:, None]
