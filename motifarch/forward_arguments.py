"""Keyword arguments that transformers' models hand down from ``forward`` to their attention."""

from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from motif_kernels.checks import may_read

READ_ELSEWHERE = frozenset(TransformersKwargs.__annotations__) | {
    "cache_position",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "token_type_ids",
    "tokenizer",
    "use_cache",
}
"""What other parts of a model read, or none: transformers' own, losses', tokenizers' and
generate's, which hands the tokenizer of its stop strings on.
"""


def check_arguments(
    others: dict[str, Any], cu_seq_lens_q: Tensor | None = None, max_length_q: int | None = None
) -> None:
    """Checks that the arguments which an attention does not read change nothing: what a caller or a
    model's own attention means by them (sinks, say) must not be lost.

    Args:
        others: the arguments that are not read.
        cu_seq_lens_q: bounds of packed documents, which are read.
        max_length_q: likewise.

    Raises:
        ValueError: naming an argument that is not None and not known, or a value that is not
            served.
    """
    unknown = [name for name, value in others.items() if value is not None and name not in READ_ELSEWHERE]
    if unknown:
        raise ValueError(
            f"attention was given {', '.join(unknown)}, which it does not have; leave it out (a model whose own "
            "attention needs it can't have this one instead)"
        )
    if others.get("is_causal") is False:
        raise ValueError("is_causal is False, but this attention is causal; leave it out")
    for name, value, queries in (
        ("cu_seq_lens_k", others.get("cu_seq_lens_k"), cu_seq_lens_q),
        ("max_length_k", others.get("max_length_k"), max_length_q),
    ):
        if value is not None and not _are_equal(value, queries):
            raise ValueError(f"{name} is {value} and that of queries {queries}; self-attention has one, as of queries")


def _are_equal(keys: Any, queries: Any) -> bool:
    if keys is queries:
        return True
    if isinstance(keys, Tensor) and isinstance(queries, Tensor):
        # Values are not read where that would stall a GPU, or while the call is traced.
        return keys.shape == queries.shape and (not may_read(keys) or torch.equal(keys, queries))
    return queries is not None and int(keys) == int(queries)
