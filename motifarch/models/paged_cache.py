"""A key/value cache in blocks: memory is taken as rows grow, not for the longest row in advance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from motif_kernels.ops.decoding import append_to_cache


class _Blocks:
    """Which block of every layer's pool holds which part of which row: one table for all layers."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free = list(range(num_blocks - 1, -1, -1))
        self.table: Tensor | None = None

    def reserve(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        """The table (B, blocks of a row) int32, with room for so many tokens in every row.

        Raises:
            ValueError: the pool is used up.
        """
        held = 0 if self.table is None else self.table.shape[1]
        more = -(-tokens // self.block_size) - held
        if more * batch > len(self.free):
            raise ValueError(
                f"the paged cache has {self.num_blocks} blocks of {self.block_size} tokens, and {len(self.free)} are "
                f"left: {batch} rows of {tokens} tokens need {more * batch} more; make num_blocks larger"
            )
        if more > 0:
            new = torch.tensor([[self.free.pop() for _ in range(more)] for _ in range(batch)], dtype=torch.int32)
            new = new.to(device)
            self.table = new if self.table is None else torch.cat((self.table, new), dim=1)
        assert self.table is not None
        return self.table

    def release(self) -> None:
        """All blocks are free again."""
        self.table = None
        self.free = list(range(self.num_blocks - 1, -1, -1))


class PagedLayer(CacheLayerMixin):
    """One layer's pools of keys and values, (blocks, block size, heads, width).

    Args:
        blocks: the table, shared by all layers.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, blocks: _Blocks) -> None:
        super().__init__()
        self._blocks, self._length = blocks, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pools for heads and widths like these (B, heads, S, width)."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.zeros(
                self._blocks.num_blocks,
                self._blocks.block_size,
                t.shape[1],
                t.shape[3],
                dtype=t.dtype,
                device=t.device,
            )
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    @torch.no_grad()
    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Write new tokens (B, S, heads, width) behind those that rows hold.

        Returns:
            The pools of keys and values, the rows' lengths (B,) int32 and their blocks
            (B, blocks of a row) int32.
        """
        if not self.is_initialized:
            self.lazy_initialization(key.transpose(1, 2), value.transpose(1, 2))
        assert self.keys is not None
        assert self.values is not None
        batch, added = key.shape[:2]
        table = self._blocks.reserve(batch, self._length + added, key.device)
        if len(table) != batch:
            raise ValueError(f"the paged cache holds {len(table)} rows and {batch} come; reset() it for another batch")
        lengths = torch.full((batch,), self._length, dtype=torch.int32, device=key.device)
        append_to_cache(self.keys, key, lengths, table)
        append_to_cache(self.values, value, lengths, table)
        self._length += added
        return self.keys, self.values, lengths + added, table

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Transformers' own interface: append (B, heads, S, width), and copy out everything
        held.
        """
        keys, values, _, table = self.append(key_states.transpose(1, 2), value_states.transpose(1, 2))
        whole = [t[table.long()].flatten(1, 2)[:, : self._length].transpose(1, 2) for t in (keys, values)]
        return whole[0], whole[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that queries see."""
        return self._length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held in each row."""
        return self._length

    def get_max_length(self) -> int:
        """Unknown: rows share the pool."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; the pools stay."""
        self._length = 0
        self._blocks.release()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not supported: beams would share blocks and then write into them.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("a PagedCache does not serve beam search; take a DynamicCache")


class PagedCache(Cache):
    """A cache whose rows lie in blocks of a common pool, for generation with Motif models
    (and, copying, with others).

    ``model.generate(..., past_key_values=PagedCache(model.config, num_blocks=...,
    block_size=...))``. The pools are made when the first tokens come; the attention reads them in
    place. Layers with a sliding window keep all their tokens here and read the window's.

    Args:
        config: the model's; how many layers there are.
        num_blocks: blocks of each layer's pool.
        block_size: tokens of a block.

    Raises:
        ValueError: a size that is not positive.
    """

    def __init__(self, config: Any, *, num_blocks: int, block_size: int = 256) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        blocks = _Blocks(num_blocks, block_size)
        super().__init__(layers=[PagedLayer(blocks) for _ in range(config.num_hidden_layers)])

    def append(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """:meth:`PagedLayer.append` of a layer: what the attention layers call instead of
        ``update``.
        """
        layer = self.layers[layer_idx]
        assert isinstance(layer, PagedLayer)
        return layer.append(key, value)
