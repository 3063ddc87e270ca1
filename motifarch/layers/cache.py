"""Where a batch stands in a key/value cache, and what its queries see there."""

from typing import Any

import torch
from torch import Tensor


class CachePosition:
    """How many tokens each row of a cache holds before a call, and how many of those are padding.

    One serves all layers of a call: what depends on it is worked out once for each size of cache.

    Args:
        seen: tokens that each row holds: a number (a symbol, in a program that is exported), or a
            scalar tensor where the cache counts on its device.
        batch: B.
        num_new: tokens that this call appends.
        leftpad: (B,) int32, tokens at the start of each row that are padding; None for none.
        device: where the attention runs.
    """

    def __init__(
        self,
        seen: int | Tensor,
        batch: int,
        num_new: int,
        *,
        leftpad: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.seen, self.leftpad = seen, leftpad
        self._batch, self._num_new, self._device = batch, num_new, device
        self._within: dict[int, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def of(cls, past_key_values: Any, layer_idx: int, key: Tensor) -> "CachePosition":
        """The position of a layer's cache where ``key`` (B, S, heads, width) will go."""
        seen = past_key_values.get_seq_length(layer_idx)
        # A static cache counts in place, in the very tensor that it hands out.
        return cls(seen.clone() if isinstance(seen, Tensor) else seen, *key.shape[:2], device=key.device)

    @property
    def is_start(self) -> bool:
        """Whether nothing is cached yet, as far as the host knows."""
        return not isinstance(self.seen, Tensor) and self.seen == 0

    def within(self, places: int) -> tuple[Tensor, Tensor | None]:
        """Lengths (B,) int32 with the new tokens, and padding, of the last ``places``."""
        if places not in self._within:
            if not isinstance(self.seen, Tensor):
                total = self.seen + self._num_new
                held = min(total, places)
                lengths = torch.full((self._batch,), held, dtype=torch.int32, device=self._device)
                dropped: int | Tensor = total - held
            else:
                whole = self.seen.to(torch.int32).expand(self._batch) + self._num_new
                lengths = whole.clamp(max=places)
                dropped = whole - lengths
            leftpad = None if self.leftpad is None else (self.leftpad - dropped).clamp(min=0)
            self._within[places] = lengths, leftpad
        return self._within[places]


def held_width(past_key_values: Any, layer_idx: int, width: int) -> int:
    """Width of the heads that a cache of fixed size has room for.

    One that was made ahead of its first call has the config's heads, each of a pair by itself; one
    that a call makes has that call's, of ``width``.
    """
    layer = past_key_values.layers[layer_idx]
    return int(layer.keys.shape[-1]) if layer.is_initialized else width
