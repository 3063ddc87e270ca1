"""Hashes of what a checkpoint holds, taken while it is written: parts by rank, then the whole."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from motifarch.files import read_json
from motifarch.ledger.tensor_hash import TensorPart, hash_part, state_root, tensor_hash

HASHES = "tensors.json"
"""The file of a checkpoint that holds the hash of each tensor."""
WEIGHTS = "model."
"""What the names of weights begin with."""
_AHEAD = 4
"""Tensors that wait to be hashed, at most: they may be made for the writing alone."""


class HashingPlanner:
    """Stands before a planner, and hashes what it gives to be written, in threads of its own."""

    def __init__(self, planner: SavePlanner) -> None:
        self._planner = planner
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="hash")
        self._waiting: dict[MetadataIndex, Future[TensorPart]] = {}
        self.parts: dict[MetadataIndex, TensorPart] = {}
        """Of the tensors, complete after :meth:`finish`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._planner, name)

    def resolve_data(self, write_item: WriteItem) -> Any:
        """As the planner, whose tensors are hashed too."""
        data = self._planner.resolve_data(write_item)
        if isinstance(data, Tensor) and write_item.tensor_data is not None:
            about = write_item.tensor_data
            work = self._pool.submit(_hash, data, list(about.chunk.offsets), list(about.size))
            self._waiting[write_item.index] = work
            if len(self._waiting) > _AHEAD:
                self._take(next(iter(self._waiting)))
        return data

    def _take(self, index: MetadataIndex) -> None:
        self.parts[index] = self._waiting.pop(index).result()

    def finish(self) -> None:
        """Waits for the hashes."""
        for index in list(self._waiting):
            self._take(index)
        self._pool.shutdown()


def _hash(data: Tensor, offsets: list[int], shape: list[int]) -> TensorPart:
    return hash_part(data.detach().cpu(), offsets, shape)


def joined_hashes(parts: Iterable[tuple[str, TensorPart]]) -> dict[str, str]:
    """The hash of each tensor, hexadecimal, by name, of all ranks' parts.

    Raises:
        ValueError: a part is missing.
    """
    by_name: dict[str, list[TensorPart]] = {}
    for name, part in parts:
        by_name.setdefault(name, []).append(part)
    return {name: tensor_hash(own).hex() for name, own in sorted(by_name.items())}


def weights_root(model: nn.Module) -> str | None:
    """The Merkle root over a model's weights, on rank 0; where there are ranks, collectively."""
    alone = not dist.is_initialized()
    planner = DefaultSavePlanner()
    planner.set_up_planner({WEIGHTS[:-1]: get_model_state_dict(model)}, is_coordinator=alone or dist.get_rank() == 0)
    hashing = HashingPlanner(planner)
    for item in planner.create_local_plan().items:
        hashing.resolve_data(item)
    hashing.finish()
    own = [(index.fqn, part) for index, part in hashing.parts.items()]
    if alone:
        return roots(joined_hashes(own))["weights"]
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everyone)
    return None if everyone is None else roots(joined_hashes(chain.from_iterable(everyone)))["weights"]


def saved_roots(checkpoint: Path) -> dict[str, str]:
    """The roots over a complete checkpoint's tensors, by what it says of them; none of one that was
    saved before checkpoints had hashes.

    Raises:
        ValueError: what it says can't be used.
    """
    if not (checkpoint / HASHES).is_file():
        return {}
    try:
        return roots(read_json(checkpoint / HASHES))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{HASHES} can't be used ({error})") from None


def roots(hashes: Mapping[str, str]) -> dict[str, str]:
    """The Merkle roots over a checkpoint's tensors: ``weights``, under the model's own names, and
    ``state``, all.
    """
    everything = {name: bytes.fromhex(value) for name, value in hashes.items()}
    weights = {name.removeprefix(WEIGHTS): value for name, value in everything.items() if name.startswith(WEIGHTS)}
    return {"weights": state_root(weights).hex(), "state": state_root(everything).hex()}
