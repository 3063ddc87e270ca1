"""Classes made from a host's at run time, and their objects made from the host's objects.

The host's objects stay as they are: a model's modules are replaced, not changed, for others may
hold them. Pickle finds such classes again by making them again.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import nn


class Derived:
    """Mixed into a class that a function made from a host's class."""

    made_by: tuple[Callable[..., type], type]
    """The function, and the host's class."""

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        """For pickle and copy: this class is an attribute of no module."""
        return _blank, type(self).made_by, self.__getstate__()


def _blank(make: Callable[[type], type], host: type) -> Any:
    return object.__new__(make(host))


def derive(source: Any, derived: type) -> Any:
    """An object of a class derived from the source's, with all that the source has.

    Attributes are shared, but not the dictionaries that hold them (a module's parameters,
    submodules and hooks): what is replaced in the one stays in the other.
    """
    result: Any = object.__new__(derived)
    result.__dict__.update({n: copy.copy(v) if isinstance(v, dict | set) else v for n, v in vars(source).items()})
    return result


def linear_of(source: nn.Linear, change: Any) -> nn.Linear:
    """A linear layer whose weight and bias are another's, changed in their rows."""
    weight = change(source.weight)
    result = nn.Linear(source.in_features, len(weight), bias=source.bias is not None, device="meta")
    result.weight = nn.Parameter(weight, requires_grad=source.weight.requires_grad)
    if source.bias is not None:
        result.bias = nn.Parameter(change(source.bias), requires_grad=source.bias.requires_grad)
    return result.train(source.training)


def beside(module: nn.Module, name: str) -> Any:
    """What the file that defines a host's module calls by that name.

    Raises:
        ValueError: no such thing.
    """
    files = [vars(sys.modules[made.__module__]) for made in type(module).__mro__]
    if not any(name in file for file in files):
        raise ValueError(f"the file that defines {type(module).__name__} has no {name}")
    return next(file[name] for file in files if name in file)
