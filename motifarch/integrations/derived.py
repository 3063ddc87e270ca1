"""Classes made from a host's at run time, and their objects made from the host's objects.

The host's objects stay as they are: a model's modules are replaced, not changed, for others may
hold them. Pickle finds such classes again by making them again.
"""

import copy
from collections.abc import Callable
from typing import Any


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
