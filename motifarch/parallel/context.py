"""Context parallelism: ranks share a row's tokens. They trade them for heads where a layer sees the
whole row (Ulysses), and send a window's keys where it sees no more (halo).
"""

from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from motifarch.decoder_layers import decoder_layers
from motifarch.errors import UserError
from motifarch.layers import MixtureOfExperts
from motifarch.layers.cross_entropy import next_labels
from motifarch.parallel.tensor import head_counts

_TOKENS = ("input_ids", "position_ids", "shift_labels", "mtp_labels")


def check_context_parallel(config: Any, seq_len: int, ranks: int, tensor: int = 1) -> None:
    """Refuses a MotifConfig's model or a sequence that so many ranks cannot share, ``tensor`` ranks
    of tensor parallelism sharing the heads before these do.

    Heads have to divide where a layer sees the whole row; windows ask nothing of them.

    Raises:
        UserError: naming the number that does not divide, and those that would.
    """
    if seq_len % ranks:
        raise UserError(f"parallel.context is {ranks}, which does not divide sequences of {seq_len} tokens")
    full = [window for window in config.windows if window[0] < 0]
    for name, count in head_counts(config).items() if full else ():
        if count % (ranks * tensor):
            fitting = ", ".join(str(n) for n in range(1, count + 1) if count % (n * tensor) == 0)
            each = f" (times parallel.tensor {tensor})" if tensor > 1 else ""
            raise UserError(
                f"parallel.context is {ranks}{each}, which does not divide the {count} {name}: every rank takes whole "
                f"heads in the {len(full)} layers without a window, while attention runs; it may be {fitting}"
            )


def apply_context_parallel(model: nn.Module, group: ProcessGroup) -> None:
    """Lets a model's attention exchange tokens, and its experts' losses be those of whole rows, in
    place.
    """
    for layer in decoder_layers(model):
        layer.self_attn.context_group = group  # type: ignore[union-attr]
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.context_group = group


def shard_sequence(batch: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """This rank's consecutive part of a packed row's tokens (1, T), from `motifarch.data.collate`;
    ``ranks`` divide T, and the documents' bounds stay those of the whole row.

    What multi-token prediction needs of the token after the part comes along: its id, unless a
    document ends there, and the targets as the whole row has them.
    """
    if ranks == 1:
        return batch
    batch = batch | {"mtp_labels": next_labels(batch["shift_labels"], batch["cu_seq_lens_q"])}

    def part(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.chunk(ranks, dim=1)[rank].contiguous()

    ids = batch["input_ids"]
    end = (rank + 1) * (ids.shape[1] // ranks)
    following = ids[:, end : end if end in batch["cu_seq_lens_q"] else end + 1]
    return batch | {name: part(batch[name]) for name in _TOKENS} | {"next_input_ids": following}
