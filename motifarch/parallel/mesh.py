"""A run's ranks as process groups, and what each arrangement means for data and gradients."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from motifarch.layout import Layout


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
        self._experts = None
        if layout.expert > 1:
            self._experts = init_device_mesh(
                device_type,
                (layout.replicate, layout.expert_shard, layout.expert, layout.tensor),
                mesh_dim_names=("replicate", "expert_shard", "expert", "tensor"),
            )

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
    def experts(self) -> DeviceMesh | None:
        """The ranks that the routed experts are dealt out to, None for one."""
        return None if self._experts is None else self._experts["expert"]

    @property
    def expert_parameters(self) -> DeviceMesh:
        """The ranks that FSDP2 works on for the experts of one rank, as `parameters` for others."""
        if self._experts is None:
            return self.parameters
        hybrid = self.layout.replicate > 1
        return self._experts["replicate", "expert_shard"] if hybrid else self._experts["expert_shard"]

    @property
    def data_rank(self) -> int:
        """Which part of a batch's rows this rank takes, from 0."""
        return dist.get_rank() // (self.layout.context * self.layout.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of each row's tokens, from 0."""
        return dist.get_rank() // self.layout.tensor % self.layout.context

    @property
    def token_rank(self) -> int:
        """Which part of a batch's tokens, from 0: ranks of `tensor` have the same ones."""
        return dist.get_rank() // self.layout.tensor
