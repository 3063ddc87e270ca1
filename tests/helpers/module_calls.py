"""Whether a model uses each of its parameters by calling the module that has it: all that adapters,
hooks, sharding units, offloading and quantisation see.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], list[Tensor]]
"""What a model computes, to be compared."""


class Opaque(nn.Module):
    """Another module behind a call: nothing of it can be read."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        vars(self)["call"] = inner.__call__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def owners(model: nn.Module) -> list[str]:
    """Names of the modules that have parameters of their own."""
    return [n for n, m in model.named_modules() if n and next(m.parameters(recurse=False), None) is not None]


@contextmanager
def tilted(module: nn.Module) -> Iterator[None]:
    """Within, each column that a module's call gives is multiplied by another factor."""

    def tilt(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, tuple):
            return tilt(_, __, out[0]), *out[1:]
        return out * torch.linspace(1, 2, out.shape[-1]) if out.ndim else 2 * out

    with module.register_forward_hook(tilt):
        yield


@contextmanager
def hidden(model: nn.Module, name: str) -> Iterator[None]:
    """Within, a module can be called and not read."""
    parent, _, attribute = name.rpartition(".")
    holder = model.get_submodule(parent)
    inner = getattr(holder, attribute)
    setattr(holder, attribute, Opaque(inner))
    yield
    setattr(holder, attribute, inner)


def assert_hooks_take_effect(model: nn.Module, run: Run, names: list[str] | None = None) -> None:
    """What any module, or any of these, gives, as a hook changes it, is what is gone on with, in
    all that is run.
    """
    expected = run()
    for name in owners(model) if names is None else names:
        with tilted(model.get_submodule(name)):
            for i, (found, before) in enumerate(zip(run(), expected, strict=True)):
                assert not torch.equal(found, before), f"a hook on {name} changes nothing in result {i}"


def assert_calls_are_enough(model: nn.Module, run: Run) -> None:
    """Every module without children can be known by its call alone."""
    expected = run()
    for name in owners(model):
        if not next(model.get_submodule(name).children(), None):
            with hidden(model, name):
                for found, before in zip(run(), expected, strict=True):
                    torch.testing.assert_close(found, before, msg=lambda m, n=name: f"{n}: {m}")
