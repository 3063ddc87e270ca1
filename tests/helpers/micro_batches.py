"""A step of several micro-batches: what each rank sends, and what it holds between them."""

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from motifarch.models.motif import MotifConfig, MotifForCausalLM
from motifarch.optim import build_adamw
from motifarch.parallel import Layout, Mesh, initialize, open_world, parallelize
from motifarch.plan.communication import recognise
from motifarch.train.checkpoint import TrainState
from motifarch.train.step import train_step

SEQ_LEN = 16


class Collectives(TorchDispatchMode):
    """Counts collectives over more than one rank, as "all-gather over 2"."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        out = func(*args, **(kwargs or {}))
        if call := recognise(func, args, [out] if isinstance(out, torch.Tensor) else []):
            self.calls[f"{call.kind} over {len(call.ranks)}"] += 1
        return out


def reachable_bytes() -> int:
    """Bytes of all tensors that this process can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not isinstance(thing, DTensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def held_between(model: torch.nn.Module) -> Iterator[list[int]]:
    """Live bytes as each micro-batch's forward pass begins."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: found.append(reachable_bytes()))
    yield found
    hook.remove()


def measure_step(
    output: Path, config: dict[str, Any], layouts: dict[str, Layout], micro_batches: int, dtype: torch.dtype
) -> None:
    """A step under each layout; every rank writes its collectives and live bytes."""
    with open_world() as world:
        found = {}
        for name, layout in layouts.items():
            mesh = Mesh("cpu", layout.resolve(world.size))
            with torch.device("meta"):
                model = MotifForCausalLM(MotifConfig(**config)).train()
            parallelize(model, mesh, compute_dtype=dtype)
            initialize(model, torch.device("cpu"), seed=0)
            state = TrainState(model, build_adamw(model, lr=1e-3))
            ids = torch.randint(0, model.config.vocab_size, (1, SEQ_LEN))
            batches = [{"input_ids": ids, "shift_labels": ids}] * micro_batches
            options: dict[str, Any] = {"lr": 1e-3, "clip": None, "layout": mesh.layout}
            train_step(state, batches, world=world, targets=SEQ_LEN, **options)  # the first makes moments too
            with held_between(model) as held, Collectives() as collectives:
                train_step(state, batches, world=world, targets=SEQ_LEN, **options)
            whole = sum(4 * p.numel() for p in model.parameters())
            found[name] = {"calls": collectives.calls, "held": held, "whole": whole}
        (output / f"{world.rank}.json").write_text(json.dumps(found))
