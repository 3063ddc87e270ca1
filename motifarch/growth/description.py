"""What a grown model is made of, before any weight is read.

A :class:`Description` is a model folder to be: its config and, for each tensor, an :class:`Origin`.
Growth steps, and conversions from other kinds of models, are functions from one description to
another; :func:`describe` gives a source folder's own, to begin with. To build on this for another
kind of source: make the origins from the names that its folder has (``Origin.read`` for one tensor
as it is, ``Origin.joined`` for one made of several, ``Origin.constant`` for one made of none), put
the Motif names over them, say in a :class:`Step` what was done and what could not be kept, and hand
the description to :func:`motifarch.growth.grow.write`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from motifarch.growth.folders import SourceFolder

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Origin:
    """How one tensor comes from tensors of the source folder."""

    shape: Shape
    dtype: torch.dtype
    sources: tuple[str, ...]
    """Names in the source folder."""
    make: Callable[..., Tensor]
    """From the tensors of those names, in that order; it must not change them."""

    @classmethod
    def read(cls, source: SourceFolder, name: str, dtype: torch.dtype | None = None) -> Origin:
        """A tensor of the source as it is, or in another dtype."""
        kept = source.dtype(name) if dtype is None else dtype
        return cls(source.shape(name), kept, (name,), lambda tensor: tensor.to(kept))

    @classmethod
    def constant(cls, value: float, shape: Shape, dtype: torch.dtype) -> Origin:
        """A tensor filled with one number."""
        return cls(shape, dtype, (), lambda: torch.full(shape, value, dtype=dtype))

    @classmethod
    def joined(cls, origins: Sequence[Origin], shape: Shape, function: Callable[..., Tensor]) -> Origin:
        """A tensor that a function makes of several; its dtype is the first one's."""
        bounds = [0]
        for origin in origins:
            bounds.append(bounds[-1] + len(origin.sources))

        def make(*tensors: Tensor) -> Tensor:
            parts = zip(origins, bounds, bounds[1:], strict=False)
            return function(*(origin.make(*tensors[start:stop]) for origin, start, stop in parts))

        return cls(shape, origins[0].dtype, tuple(name for origin in origins for name in origin.sources), make)

    def then(self, shape: Shape, function: Callable[[Tensor], Tensor]) -> Origin:
        """The tensor that a function makes of this one, in the same dtype."""
        return Origin.joined([self], shape, function)


@dataclass(frozen=True)
class Step:
    """What a step does, for people and for the record."""

    summary: str
    """Such as "hidden size 2048 -> 4096"."""
    loss: str | None = None
    """What it can't keep of the function, by how much, and what would keep it; None if it keeps all
    but rounding in the last place.
    """


@dataclass(frozen=True)
class Description:
    """A model folder to be."""

    config: dict[str, Any]
    tensors: dict[str, Origin]
    """By name, in the order in which they are written."""
    steps: tuple[Step, ...] = field(default=())

    def changed(self, config: dict[str, Any], tensors: dict[str, Origin], step: Step) -> Description:
        """The description after a step.

        Args:
            config: fields that the step sets.
            tensors: all tensors after it.
            step: what it did.
        """
        return dataclasses.replace(self, config=self.config | config, tensors=tensors, steps=(*self.steps, step))


def describe(source: SourceFolder, dtype: torch.dtype | None = None) -> Description:
    """A folder's own description.

    Args:
        source: the folder.
        dtype: to turn the weights into before any step computes with them; None keeps each tensor's
            own.
    """
    config = dict(source.config)
    if dtype is not None:
        # transformers 5 reads "dtype", older ones "torch_dtype".
        fields = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        config |= dict.fromkeys(fields, str(dtype).removeprefix("torch."))
    return Description(config, {name: Origin.read(source, name, dtype) for name in source.names})
