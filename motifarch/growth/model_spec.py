"""What a grown model is made of, before any weight is read.

Growth steps, and conversions from other kinds of models, are functions from one :class:`ModelSpec`
to another; :func:`describe` gives a source folder's own. A conversion makes a :class:`LazyTensor`
for each of its model's names of those that its folder has, says in a :class:`Step` what was done
and what could not be kept, and hands the spec to :func:`motifarch.growth.grow.write`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from motifarch.growth.folders import SourceFolder

Shape = tuple[int, ...]

_FLOAT32 = ("expert_bias", "e_score_correction_bias")
"""Biases by which experts are selected keep their dtype: rounded, they would select others."""


@dataclass(frozen=True)
class LazyTensor:
    """How one tensor comes from tensors of the source folder."""

    shape: Shape
    dtype: torch.dtype
    sources: tuple[str, ...]
    """Names in the source folder."""
    make: Callable[..., Tensor]
    """From the tensors of those names, in that order; it must not change them."""

    @classmethod
    def from_checkpoint(cls, source: SourceFolder, name: str, dtype: torch.dtype | None = None) -> "LazyTensor":
        """A tensor of the source as it is, or in another dtype."""
        kept = source.dtype(name) if dtype is None else dtype
        return cls(source.shape(name), kept, (name,), lambda tensor: tensor.to(kept))

    @classmethod
    def constant(cls, value: float, shape: Shape, dtype: torch.dtype) -> "LazyTensor":
        """A tensor filled with one number."""
        return cls(shape, dtype, (), lambda: torch.full(shape, value, dtype=dtype))

    @classmethod
    def joined(cls, inputs: Sequence["LazyTensor"], shape: Shape, function: Callable[..., Tensor]) -> "LazyTensor":
        """A tensor that a function makes of several; its dtype is the first one's."""
        bounds = [0]
        for lazy in inputs:
            bounds.append(bounds[-1] + len(lazy.sources))

        def make(*tensors: Tensor) -> Tensor:
            parts = zip(inputs, bounds, bounds[1:], strict=False)
            return function(*(lazy.make(*tensors[start:stop]) for lazy, start, stop in parts))

        return cls(shape, inputs[0].dtype, tuple(name for lazy in inputs for name in lazy.sources), make)

    def then(self, shape: Shape, function: Callable[[Tensor], Tensor]) -> "LazyTensor":
        """The tensor that a function makes of this one, in the same dtype."""
        return LazyTensor.joined([self], shape, function)


@dataclass(frozen=True)
class Step:
    """What a step does, for people and for the record."""

    summary: str
    """Such as "hidden size 2048 -> 4096"."""
    loss: str | None = None
    """What it can't keep of the function, by how much, and the remedy; None if only rounding."""


@dataclass(frozen=True)
class ModelSpec:
    """A model folder to be."""

    config: dict[str, Any]
    tensors: dict[str, LazyTensor]
    """By name, in the order in which they are written."""
    steps: tuple[Step, ...] = field(default=())
    same_ids: int | None = None
    """Token ids, from 0 on, that mean what they meant to the source; None for all."""

    def changed(self, config: dict[str, Any], tensors: dict[str, LazyTensor], step: Step) -> "ModelSpec":
        """The spec after a step: the config fields that it sets, and all tensors after it."""
        return dataclasses.replace(self, config=self.config | config, tensors=tensors, steps=(*self.steps, step))

    def comparing(self, same_ids: int) -> "ModelSpec":
        """The spec, of which token ids up to that alone mean what they meant."""
        return dataclasses.replace(self, same_ids=same_ids)


def draw_for(name: str, seed: int) -> torch.Generator:
    """Random numbers of a tensor's own, whatever else is made."""
    drawn = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8])
    return torch.Generator().manual_seed(drawn % 2**63)


def describe(source: SourceFolder, dtype: torch.dtype | None = None) -> ModelSpec:
    """A folder's own spec, its weights turned into ``dtype`` before any step computes with them;
    None keeps each tensor's own, as biases that select experts always do.
    """
    config = dict(source.config)
    if dtype is not None:
        # transformers 5 reads "dtype", older ones "torch_dtype".
        fields = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
        config |= dict.fromkeys(fields, str(dtype).removeprefix("torch."))
    tensors = {
        name: LazyTensor.from_checkpoint(source, name, None if name.endswith(_FLOAT32) else dtype)
        for name in source.names
    }
    return ModelSpec(config, tensors)
