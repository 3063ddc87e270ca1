"""Context parallelism: ranks share a row's tokens and trade them for heads (Ulysses)."""

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from motifarch.errors import UserError
from motifarch.parallel.tensor import check_cuts_model, head_counts

_TOKENS = ("input_ids", "position_ids", "shift_labels")


def check_context_parallel(config: Any, seq_len: int, ranks: int, tensor: int = 1) -> None:
    """Refuses a MotifConfig's model or a sequence that so many ranks cannot share, ``tensor`` ranks
    of tensor parallelism sharing the heads before these do.

    Raises:
        UserError: naming the number that does not divide, and those that would, or a part that is
            not cut.
    """
    check_cuts_model(config, "context", ranks)
    if seq_len % ranks:
        raise UserError(f"parallel.context is {ranks}, which does not divide sequences of {seq_len} tokens")
    for name, count in head_counts(config).items():
        if count % (ranks * tensor):
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % (n * tensor) == 0)
            each = f" (times parallel.tensor {tensor})" if tensor > 1 else ""
            raise UserError(
                f"parallel.context is {ranks}{each}, which does not divide the {count} {name}: every rank takes whole "
                f"heads while attention runs; it may be {fitting}"
            )


def apply_context_parallel(model: nn.Module, group: ProcessGroup) -> None:
    """Lets a model's attention exchange tokens for heads, in place."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.self_attn.context_group = group


def shard_sequence(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """This rank's consecutive part of a packed row's tokens (1, T), from `motifarch.data.collate`;
    ``ranks`` divide T, and the documents' bounds stay those of the whole row.
    """
    if ranks == 1:
        return batch

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, dim=1)[rank].contiguous()

    return batch | {name: part(batch[name]) for name in _TOKENS}
