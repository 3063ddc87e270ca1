"""Motif-3 on ranks that hold parts of a row, whole and with one exchange between them left out:
functions that ranks run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from helpers.models import random_ids
from helpers.motif_3 import TINY, trained_motif_3
from motifarch.layers import IGNORE_INDEX, group_sum, halo, ulysses
from motifarch.layers.cross_entropy import next_labels
from motifarch.models.motif import MotifForCausalLM
from motifarch.parallel.context import apply_context_parallel, shard_sequence

_all_to_all = halo.all_to_all_single_autograd

OMISSIONS: dict[str, tuple[Any, str, Callable[..., Any]] | None] = {
    "keys of the halo": (halo, "all_to_all_single_autograd", lambda *args: _all_to_all(*args) * 0),
    "gradients of the halo": (halo, "all_to_all_single_autograd", lambda *args: _all_to_all(*args).detach()),
    "heads for tokens": (ulysses, "all_to_all_single_autograd", lambda x, *_: x),
    "the experts' sums": (group_sum._SumBoth, "forward", group_sum._SumGradient.forward),
    "gradients of the experts' sums": (group_sum._SumBoth, "backward", staticmethod(lambda _, grad: (grad, None))),
    "the token after the part": None,
    "the target after the part": None,
}
"""What ranks do not send each other, with what takes its place; None for what a batch lacks."""


SEQUENCE = 8
"""Tokens of a training sequence."""


def compare(output: Path) -> None:
    """The largest difference of loss and gradients to one process's, for each omission and, under
    "nothing", without one; rank 0 saves them.
    """
    dist.init_process_group("gloo")
    batch = _batch()
    targets = int((batch["shift_labels"] != IGNORE_INDEX).sum())
    expected = {length: _step(trained_motif_3(length), batch, targets) for length in (SEQUENCE, None)}
    differences = {}
    for name in ("nothing", "nothing, of one sequence", *OMISSIONS):
        length = None if name == "nothing, of one sequence" else SEQUENCE
        model = trained_motif_3(length)
        apply_context_parallel(model, dist.group.WORLD)  # type: ignore[arg-type]
        with _without(name):
            found = _step(model, _part(batch, name), targets / dist.get_world_size())
        for value in found.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
        truth = expected[length]
        assert found.keys() == truth.keys()
        differences[name] = {key: float((found[key] - value).abs().max()) for key, value in truth.items()}
    if dist.get_rank() == 0:
        torch.save(differences, output)
    dist.destroy_process_group()


def _batch() -> dict[str, Any]:
    """A row of three sequences, of which the second, a single document, lies on both ranks."""
    bounds = torch.tensor([0, 3, 8, 16, 19, 24], dtype=torch.int32)
    lengths = bounds.diff()
    ids = random_ids(1, 24, vocab_size=TINY["vocab_size"])
    positions = torch.arange(24) - torch.repeat_interleave(bounds[:-1], lengths)
    batch = {"input_ids": ids, "position_ids": positions[None], "shift_labels": next_labels(ids, bounds)}
    return batch | {"cu_seq_lens_q": bounds, "max_length_q": int(lengths.max())}


def _part(batch: dict[str, Any], name: str) -> dict[str, Any]:
    part = shard_sequence(batch, dist.get_rank(), dist.get_world_size())
    if name == "the token after the part":
        part["next_input_ids"] = torch.zeros_like(part["next_input_ids"])
    if name == "the target after the part":
        part["mtp_labels"][:, -1] = IGNORE_INDEX
    return part


@contextmanager
def _without(name: str) -> Iterator[None]:
    replaced = OMISSIONS.get(name)
    if replaced is None:
        yield
    else:
        with mock.patch.object(*replaced):
            yield


def _step(model: MotifForCausalLM, batch: dict[str, Any], num_items: float) -> dict[str, Tensor]:
    loss = model(**batch, num_items_in_batch=torch.tensor(num_items)).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
