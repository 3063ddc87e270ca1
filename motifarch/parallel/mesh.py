"""How the ranks of a run are arranged, and what each arrangement means for data and gradients."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch.distributed as dist
from pydantic import BeforeValidator
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from motifarch.errors import UserError
from motifarch.field_types import Ranks
from motifarch.typed_yaml import Section

# A command line gives a text.
Rest = Annotated[Literal[-1], BeforeValidator(lambda value: -1 if value == "-1" else value)]
"""As many ranks as are left."""

DIMENSIONS = ("replicate", "shard", "context", "tensor")


@dataclass
class Layout(Section):
    """Ranks along each dimension of the mesh; neighbouring ranks differ in the last first."""

    replicate: Ranks | Rest = 1
    """Copies of the sharded parameters (HSDP), each kept by `shard` x `context` ranks: best one
    within fast links. Gradients are averaged between them; parameters are gathered within one."""
    shard: Ranks | Rest = -1
    """Ranks that share a copy, with rows of their own (FSDP); -1 takes what is left."""
    context: Ranks | Rest = 1
    """Ranks that share a row's tokens and exchange them for heads around attention (Ulysses)."""
    tensor: Ranks | Rest = 1
    """Ranks that share heads, feed-forward columns and vocabulary (tensor parallelism)."""

    @property
    def ranks(self) -> int:
        """Their number, all dimensions multiplied."""
        return self.replicate * self.shard * self.context * self.tensor

    @property
    def data_parallel_size(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.replicate * self.shard

    @property
    def grad_reduce_size(self) -> int:
        """Ranks over which gradients are averaged: all but those of `tensor`."""
        return self.data_parallel_size * self.context

    def resolve(self, ranks: int) -> "Layout":
        """The layout with its -1 filled in for so many ranks.

        Raises:
            UserError: several -1, a number below 1, or a product that is not the number of ranks.
        """
        sizes = {name: getattr(self, name) for name in DIMENSIONS}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise UserError(f"parallel.{name} is {size}; it must be at least 1, or -1 to take what is left")
        filled = [name for name, size in sizes.items() if size == -1]
        if len(filled) > 1:
            raise UserError(f"parallel.{' and parallel.'.join(filled)} are -1; only one can take what is left")
        product = math.prod(size for size in sizes.values() if size != -1)
        if product != ranks and not (filled and ranks % product == 0):
            text = ", ".join(f"parallel.{name} {size}" for name, size in sizes.items() if size not in (-1, 1)) or "1"
            verb = "does not divide" if filled else "is not"
            raise UserError(
                f"{text}: the product is {product}, which {verb} the {ranks} ranks that there are; change one of them"
                + ("" if filled else ", or set one to -1")
            )
        for name in filled:
            sizes[name] = ranks // product
        return Layout(**sizes)


class Mesh:
    """A resolved layout's ranks as torch's "cpu" or "cuda" meshes, made by all ranks together."""

    def __init__(self, device_type: str, layout: Layout) -> None:
        self.layout = layout
        # Ranks of `context` share parameters as those of `shard` do: one dimension to FSDP2.
        shape = (layout.replicate, layout.shard * layout.context, layout.tensor)
        self._mesh = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        rows = (layout.data_parallel_size, layout.context, layout.tensor)
        self._sequence = None
        if layout.context > 1:
            self._sequence = init_device_mesh(device_type, rows, mesh_dim_names=("data", "context", "tensor"))

    @property
    def parameters(self) -> DeviceMesh:
        """The ranks that FSDP2 works on: shards, and before them, with HSDP, copies."""
        return self._mesh["shard"] if self.layout.replicate == 1 else self._mesh["replicate", "shard"]

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks of tensor parallelism, None for one."""
        return None if self.layout.tensor == 1 else self._mesh["tensor"]

    @property
    def context(self) -> dist.ProcessGroup | None:
        """The ranks that share the tokens of a row, None for one."""
        return None if self._sequence is None else self._sequence["context"].get_group()

    @property
    def data_rank(self) -> int:
        """Which part of a batch's rows this rank takes, from 0."""
        return dist.get_rank() // (self.layout.context * self.layout.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of each row's tokens, from 0."""
        return dist.get_rank() // self.layout.tensor % self.layout.context
