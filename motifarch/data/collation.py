"""From blocks to the keyword arguments of one packed model call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from motifarch.data.packed import Block
from motifarch.layers import IGNORE_INDEX


def collate(blocks: Sequence[Block]) -> dict[str, Any]:
    """Lay blocks end to end as one packed sequence of T = len(blocks) * seq_len positions.

    A block's last token is a target only, so the document it ends is one position shorter here, and
    absent if that token was all of it.

    Args:
        blocks: at least one, all of one length.

    Returns:
        What transformers' models take for packed documents:

        - input_ids: int64 (1, T);
        - shift_labels: int64 (1, T), the target of each position; -100 at a document's last token,
          which has none, and where a loss mask says so;
        - position_ids: int64 (1, T), counted from 0 in each document;
        - cu_seq_lens_q, cu_seq_lens_k: int32 (documents + 1,), the documents' borders, from 0 to T;
        - max_length_q, max_length_k: int, the longest document.
    """
    tokens = np.stack([block.input_ids for block in blocks]).astype(np.int64)
    labels = tokens[:, 1:].copy()
    lengths = []
    for row, block in enumerate(blocks):
        ends = np.cumsum(block.doc_lengths[:-1])
        labels[row, ends - 1] = IGNORE_INDEX
        if block.loss_mask is not None:
            labels[row, ~block.loss_mask[1:]] = IGNORE_INDEX
        shortened = block.doc_lengths.astype(np.int64)
        shortened[-1] -= 1
        lengths.append(shortened if shortened[-1] else shortened[:-1])
    doc_lengths = np.concatenate(lengths)
    borders = np.concatenate([[0], np.cumsum(doc_lengths)])
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], doc_lengths)
    cu_seq_lens = torch.from_numpy(borders.astype(np.int32))
    longest = int(doc_lengths.max())
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])).view(1, -1),
        "shift_labels": torch.from_numpy(labels).view(1, -1),
        "position_ids": torch.from_numpy(positions).view(1, -1),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
