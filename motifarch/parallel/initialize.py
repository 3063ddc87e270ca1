"""First weights of a sharded model, the same for every number of ranks."""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from motifarch.shards import local_shard, to_local


def _with_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Each module that has parameters or buffers of its own, and those parameters that no module
    before it had.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in seen}
        seen |= {id(p) for p in own.values()}
        if own or any(True for _ in module.buffers(recurse=False)):
            yield name, module, own


@torch.no_grad()
def initialize(model: nn.Module, device: torch.device, seed: int) -> None:
    """Gives a PreTrainedModel on the meta device, sharded or not, its first weights on a device.

    Each module's weights are drawn whole by the model's own rule (`_init_weights`), from a
    generator seeded by `seed` and the module's name, and every rank keeps its part: one module's
    parameters are held at a time. Buffers are whole on every rank.

    Raises:
        RuntimeError: the rule left a parameter or a buffer without a value.
    """
    model.to_empty(device=device)
    for name, module, parameters in _with_tensors(model):
        whole = object.__new__(type(module))  # copy.copy would build an FSDP module anew
        whole.__dict__ = dict(module.__dict__)
        # With all of the module's parameters: its rule may set one that another module had before.
        whole._parameters = {
            n: None if p is None else nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype, device=device))
            for n, p in module._parameters.items()
        }
        for buffer in module.buffers(recurse=False):
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            model._init_weights(whole)  # type: ignore[operator]
        for own_name, value in [*whole.named_parameters(recurse=False), *whole.named_buffers(recurse=False)]:
            if torch.isnan(value).any():
                raise RuntimeError(f"{type(model).__name__}._init_weights left {name}.{own_name} without a value")
        for own_name, parameter in parameters.items():
            drawn = whole._parameters[own_name]
            assert drawn is not None
            to_local(parameter).copy_(local_shard(drawn, parameter))
