"""First weights of a sharded model, the same for every number of ranks."""

import copy
import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from motifarch.shards import local_shard, to_local


def _with_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Each module that has parameters of its own, and those that no module before it had."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if own:
            yield name, module, own


@torch.no_grad()
def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Gives a PreTrainedModel on the meta device, sharded or not, its first weights on a device.

    Each module's weights are drawn whole by the model's own rule (`_init_weights`), from a
    generator seeded by `seed` and the module's name, and every rank keeps its part: one module's
    parameters are held at a time.

    Raises:
        RuntimeError: the rule left a parameter without a value.
    """
    model.to_empty(device=device)
    for name, module, parameters in _with_parameters(model):
        whole = copy.copy(module)
        # With all of the module's parameters: its rule may set one that another module had before.
        whole._parameters = {
            n: None if p is None else nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype, device=device))
            for n, p in module._parameters.items()
        }
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            model._init_weights(whole)  # type: ignore[operator]
        for parameter_name, parameter in parameters.items():
            value = whole._parameters[parameter_name]
            assert value is not None
            if torch.isnan(value).any():
                raise RuntimeError(f"{type(model).__name__}._init_weights left {name}.{parameter_name} without a value")
            local = to_local(parameter)
            local.copy_(local_shard(value, parameter))
