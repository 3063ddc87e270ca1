"""How the ranks of a run are arranged."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import BeforeValidator

from motifarch.errors import UserError
from motifarch.field_types import Fraction, Ranks
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
    """Ranks that share a row's tokens. They exchange them for heads around attention (Ulysses), and
    where there is a window its keys (halo)."""
    tensor: Ranks | Rest = 1
    """Ranks that share heads, feed-forward columns and vocabulary (tensor parallelism)."""
    expert: Ranks = 1
    """Ranks out of `shard` x `context`, neighbours, that share the routed experts, each with whole
    ones: tokens go to them and come back (expert parallelism). No factor of the number of ranks."""

    reshard_after_forward: Fraction = 1.0
    """Share of the decoder layers, counted from the first, whose gathered parameters are freed
    after the forward pass and gathered again for the backward pass. Those of the others, which the
    backward pass begins with, stay: less traffic for more memory."""
    reshard_experts: bool = True
    """Free experts' gathered parameters after a micro-batch's backward pass. With false they stay
    for the next one's forward pass, when activations take least: with accumulation one gather less
    a micro-batch, and one a step in layers that `reshard_after_forward` leaves out."""

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

    @property
    def expert_shard(self) -> int:
        """Ranks of a copy that share the same experts' parameters (FSDP)."""
        return self.shard * self.context // self.expert

    def resolve(self, ranks: int) -> "Layout":
        """The layout with its -1 filled in for so many ranks.

        Raises:
            UserError: several -1, a number below 1, a product that is not the number of ranks, or
                an `expert` that does not divide shard x context.
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
                f"{text}: the product is {product}, which {verb} the number of ranks, {ranks}; change one of them"
                + ("" if filled else ", or set one to -1")
            )
        for name in filled:
            sizes[name] = ranks // product
        layout = replace(self, **sizes)
        if (sharing := layout.shard * layout.context) % self.expert:
            fitting = ", ".join(str(n) for n in range(1, sharing + 1) if sharing % n == 0)
            raise UserError(
                f"parallel.expert is {self.expert}, which does not divide the {sharing} ranks of parallel.shard "
                f"{layout.shard} x parallel.context {layout.context} that share a copy of the parameters; it may be "
                f"{fitting}"
            )
        return layout
