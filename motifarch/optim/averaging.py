"""Means of checkpoints' weights, read tensor by tensor.

A run's last checkpoints are often better in the mean (stochastic weight averaging, Izmailov et al.,
arXiv 1803.05407); Motif-2.6B went on from one every 8 billion tokens (arXiv 2508.09148).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from motifarch.checkpoint_reader import CheckpointReader
from motifarch.shards import to_local

PREFIX = "model."
"""What comes before a weight's name in a checkpoint."""


class CheckpointMean:
    """The mean of the weights in several complete checkpoints' folders; a few tensors are held at a
    time.

    The checkpoints, at least one, are of one model, written by any number of ranks. Sums are formed
    in float64 and rounded once, so the mean depends neither on their order nor on how many ranks
    wrote them or read them.
    """

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        self._readers = [CheckpointReader(folder) for folder in checkpoints]

    def weights(self) -> dict[str, torch.Tensor]:
        """Every weight's name with a tensor of its shape and dtype on the meta device."""
        saved = self._readers[0].tensors
        return {
            key.removeprefix(PREFIX): torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            for key, entry in saved.items()
            if key.startswith(PREFIX)
        }

    def mean(self, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The mean of some weights; nothing is sent between ranks, each reads what it holds.

        Args:
            like: names with tensors of the wanted shape, dtype, device and sharding (DTensors);
                their values don't matter and stay.

        Returns:
            The mean in each tensor's dtype; of a DTensor, this rank's local part.

        Raises:
            UserError: a checkpoint lacks a weight or has another shape, or can't be read.
        """
        buffers = {name: torch.empty_like(tensor) for name, tensor in like.items()}
        sums = {name: torch.zeros_like(to_local(buffer), dtype=torch.float64) for name, buffer in buffers.items()}
        for reader in self._readers:
            reader.load({PREFIX[:-1]: buffers}, no_dist=True)
            for name, buffer in buffers.items():
                sums[name] += to_local(buffer)
        return {name: total.div_(len(self._readers)).to(like[name].dtype) for name, total in sums.items()}

    @torch.no_grad()
    def fill(self, weights: Mapping[str, torch.Tensor], budget: int = 2**28) -> None:
        """Replaces the weights of a model (`get_model_state_dict`), sharded or not, by the mean, in
        place.

        At most `budget` bytes of this rank's weights are worked on at once, or one larger tensor;
        about four times as much memory is used meanwhile.

        Raises:
            UserError: as in `mean`; weights before that one are replaced then.
        """
        for part in _chunks(weights, budget):
            for name, value in self.mean(part).items():
                to_local(part[name]).copy_(value)


def _chunks(weights: Mapping[str, torch.Tensor], budget: int) -> Iterator[dict[str, torch.Tensor]]:
    chunk: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights.items():
        needed = to_local(tensor).nbytes
        if chunk and size + needed > budget:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = tensor
        size += needed
    if chunk:
        yield chunk
