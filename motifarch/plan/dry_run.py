"""A training step of one rank of a cluster, on tensors without data, without its peers.

Model, sharding, optimizer and step are those that training runs
(`motifarch.train.loop.build_state`, `motifarch.train.step.train_step`); a dispatch mode sees every
operator that the step calls on this rank.
"""

import contextlib
import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from motif_kernels.machine import assume_kernels_run
from motifarch.decoder_layers import decoder_layers
from motifarch.errors import UserError
from motifarch.layers import token_exchange
from motifarch.layers.experts import Experts
from motifarch.models.motif import MotifConfig
from motifarch.parallel import Layout, Mesh, World
from motifarch.plan import communication, flops, memory
from motifarch.plan.communication import Collective, Groups, Traffic
from motifarch.plan.memory import MemoryLedger, Place, Stretch, replaced
from motifarch.shards import to_local
from motifarch.train.loop import build_state
from motifarch.train.recipe import Recipe
from motifarch.train.step import train_step

FIND_SHAPES = "_propagate_tensor_meta_non_cached"
"""Of torch's ShardingPropagator, the one of torch's internals that a dry run replaces."""

_KIND_OF_STAGE = {"forward": memory.ACTIVATIONS, "backward": memory.ACTIVATIONS, "loss": memory.LOSS}
"""What a stage's forward pass leaves, its repetition in the backward pass included."""

# What FSDP2's operators work on: an argument's place or name, and its kind.
_KIND_OF_ARGUMENT: dict[str, tuple[int | str, str]] = {
    "fsdp::all_gather_copy_in": (1, memory.GATHERED),
    "fsdp::split_with_sizes_copy": ("out", memory.GATHERED),
    "c10d::_allgather_base_": (0, memory.GATHERED),
    "c10d::_reduce_scatter_base_": (0, memory.GRADIENTS),
}


@dataclass
class StepTrace:
    """What one rank did in a step, and what it held. Bytes and FLOPs are this rank's."""

    layout: Layout
    rows: int
    """Sequences that the rank runs through the model at once."""
    micro_batches: int
    parameters: int
    """Bytes of the rank's shards."""
    parameter_count: int
    """Numbers in the whole model."""
    gradients: int
    optimizer: int
    offloaded: int
    """Bytes of the optimizer's state in the CPU's memory."""
    experts: dict[str, int]
    """Of parameters, gradients and the optimizer's state here, bytes of routed experts'."""
    expert_load: float
    """Rows that this rank's experts got over those that ranks' experts get in the mean."""
    activations: int
    """Bytes kept for the backward pass when a micro-batch's forward pass is over."""
    stretches: dict[Place, Stretch]
    """What lived in each part of the step."""
    largest_layer: int
    """Bytes of the largest decoder layer as it is gathered."""
    outside_layers: int
    """Bytes gathered outside of decoder layers until the backward pass ends."""
    flops: dict[tuple[str, str], float]
    """A step's FLOPs by phase and part (`motifarch.plan.flops`)."""
    moved: dict[str, float]
    """Bytes that a step's other operators read and write, by phase."""
    traffic: list[Traffic]

    @property
    def highest(self) -> dict[str, int]:
        """The most bytes that there were of each kind."""
        return {kind: max(s.highest[kind] for s in self.stretches.values()) for kind in memory.KINDS}

    @property
    def peak(self) -> dict[str, int]:
        """Bytes by kind when they were most together."""
        return self._at_peak.peak

    @property
    def peak_phase(self) -> str:
        """What was being done then."""
        return self._at_peak.phase

    @property
    def _at_peak(self) -> Stretch:
        return max(self.stretches.values(), key=lambda stretch: stretch.total)


@dataclass
class _Tally:
    """What is added up over a micro-batch, or over a step's end."""

    flops: defaultdict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    moved: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    calls: defaultdict[tuple[Collective, str], float] = field(default_factory=lambda: defaultdict(float))


class _Recorder(TorchDispatchMode):
    """Sees every operator on plain tensors, after DTensor has cut it."""

    def __init__(self, visible_share: float, tokens: int) -> None:
        super().__init__()
        self.ledger = MemoryLedger()
        self.tallies: list[_Tally] = [_Tally()]
        self.activations = 0
        self.gradients: int | None = None
        self.expert_gradients = 0
        self._stage = "other"
        self._layer = -1
        self._in_blocks = 0
        self._asleep = False
        self._share, self._tokens = visible_share, tokens

    @property
    def phase(self) -> str:
        """The stage; calls or records within a backward pass are recomputation."""
        if torch._C._current_graph_task_id() != -1:
            return "recompute" if self._in_blocks or torch.is_grad_enabled() else "backward"
        return self._stage

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose operators are not recorded."""

        def run(*args: Any) -> Any:
            before, self._asleep = self._asleep, True
            try:
                return function(*args)
            finally:
                self._asleep = before

        return run

    def follow(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Hooks into the places where a step goes from one stage or layer to the next."""

        def before_micro_batch(*_: Any) -> None:
            if len(self.tallies) == 2:
                # Whatever the backward pass made and left: where nobody shares, no reduce-scatter
                # has named them gradients.
                self.ledger.rename(memory.WORKING, memory.GRADIENTS)
                # What follows is never less, and counts them apart.
                for stretch in self.ledger.stretches.values():
                    stretch.highest[memory.WORKING] = 0
            self.tallies.append(_Tally())
            self._stage, self._layer = "forward", -1

        def before_loss(*_: Any) -> None:
            self._stage, self._layer = "loss", -1
            self.activations = self.ledger.now[memory.ACTIVATIONS]

        def before_optimizer(*_: Any) -> None:
            if self.gradients is None:  # an offloaded optimizer steps in pieces
                self.tallies.append(_Tally())
            self._stage, self._layer = "optimizer", -1
            self.gradients = memory.local_bytes(p.grad for p in model.parameters() if p.grad is not None)
            experts = (p for m in model.modules() if isinstance(m, Experts) for p in m.parameters())
            self.expert_gradients = memory.local_bytes(p.grad for p in experts if p.grad is not None)

        def after_optimizer(*_: Any) -> None:
            self._stage = "other"

        def enter_block(*_: Any) -> None:
            self._in_blocks += 1
            if torch._C._current_graph_task_id() != -1:
                self._stage = "backward"  # the loss, whose logits are recomputed too, is done with

        def leave_block(*_: Any) -> None:
            self._in_blocks -= 1

        def enter_layer(number: int) -> None:
            self._layer = number

        def follow_layer(number: int, layer: nn.Module) -> None:
            def after_forward(*arguments: Any) -> None:
                for output in tree_leaves(arguments[-1]):
                    if isinstance(output, torch.Tensor) and output.requires_grad:
                        output.register_hook(lambda _: enter_layer(number))

            layer.register_forward_pre_hook(lambda *_: enter_layer(number))
            layer.register_forward_hook(after_forward)

        for number, layer in enumerate(decoder_layers(model)):
            follow_layer(number, layer)
        model.register_forward_pre_hook(before_micro_batch)
        model.model.register_forward_hook(before_loss)  # type: ignore[union-attr]
        optimizer.register_step_pre_hook(before_optimizer)
        optimizer.register_step_post_hook(after_optimizer)
        # Blocks are followed also where a recomputation stops early. The layers' own hooks stay
        # outside of what is recomputed.
        for block in (block for layer in decoder_layers(model) for block in layer.children()):
            block.register_forward_pre_hook(enter_block)
            block.register_forward_hook(leave_block, always_call=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor | AsyncCollectiveTensor) for t in types):
            return NotImplemented  # they come again as what they are made of
        kwargs = kwargs or {}
        if self._asleep or func.namespace == "prim":  # a tensor's device is asked for by an operator too
            return func(*args, **kwargs)
        phase = self.phase
        out = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        tally = self.tallies[-1]
        kind = memory.WORKING if phase == "backward" else _KIND_OF_STAGE.get(self._stage, memory.WORKING)
        for tensor in outputs:
            self.ledger.note(tensor, kind)
        if func._schema.name in _KIND_OF_ARGUMENT:
            place, kind = _KIND_OF_ARGUMENT[func._schema.name]
            for tensor in tree_leaves(kwargs[place] if isinstance(place, str) else args[place]):
                self.ledger.note(tensor, kind, again=True)
        direction = "backward" if phase == "recompute" else phase
        self.ledger.look((direction, len(self.tallies), self._layer), phase)
        if work := flops.count(func, args, kwargs, out):
            share = self._share if flops.is_plain_attention(func, args, phase, self._tokens) else 1.0
            tally.flops[phase, flops.part_of(func, args, phase, self._tokens)] += work * share
        tally.moved[phase] += flops.moved_bytes(func, [*args, *kwargs.values()], outputs)
        if call := communication.recognise(func, args, outputs):
            tally.calls[call, phase] += 1
        return out


@contextlib.contextmanager
def fake_world(ranks: int, rank: int = 0) -> Iterator[World]:
    """A world of so many ranks that is this process alone: collectives send nothing.

    Raises:
        RuntimeError: there is a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan makes a process group of its own; call destroy_process_group() first")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)  # type: ignore[no-untyped-call]
    try:
        _forget_meshes()
        assert dist.group.WORLD is not None
        yield World(rank, ranks, torch.device("cpu"), dist.group.WORLD)
    finally:
        dist.destroy_process_group()
        _forget_meshes()


def _forget_meshes() -> None:
    """Empties DTensor's caches, which take equal meshes of two worlds for one."""
    _clear_sharding_prop_cache()
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.tensor"):
            for value in list(vars(module).values()):
                if not isinstance(value, type) and callable(clear := getattr(value, "cache_clear", None)):
                    clear()
    vars(ShardingPropagator)["_propagate_tensor_meta_cached"].cache_clear()


def trace_step(
    recipe: Recipe,
    config: MotifConfig,
    *,
    seq_len: int,
    gpus: int,
    domain: int,
    compute: str = "bfloat16",
    rank: int = 0,
    expert_load: float = 1.0,
) -> StepTrace:
    """Runs one training step of one rank without data.

    A second micro-batch stands for all that follow it. Documents are as long as their rows, the
    most work that packed rows can be.

    The recipe is checked for so many GPUs, `domain` of them in an NVLink domain; the model has the
    attention that they will run, on sequences of `seq_len` tokens, in the dtype that `compute`
    names. The first rank has the largest shards. Tensors without data choose no experts: each rank
    sends as many rows to each, and this one gets `expert_load` times as many as the mean.

    Raises:
        UserError: the model or its sequences can't be cut as the recipe asks.
    """
    # An eager step in the compute dtype stands for a compiled one and for 8-bit products, which are
    # for GPUs alone; first weights are not read.
    recipe = dataclasses.replace(
        recipe,
        compile=False,
        run=dataclasses.replace(recipe.run, init_from=None),
        precision=dataclasses.replace(recipe.precision, matmul="compute"),
    )
    layout = recipe.parallel.resolve(gpus)
    rows = min(recipe.batch.micro_size, recipe.batch.size // layout.data_parallel_size)
    micro_batches = -(-recipe.batch.size // layout.data_parallel_size // rows)
    shape = rows, seq_len // layout.context
    routed = math.prod(shape) * (config.experts_top_k or 0)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder(flops.visible_share(config, seq_len), math.prod(shape))
    ledger = recorder.ledger

    def without_values(model: nn.Module, device: torch.device, seed: int) -> None:
        with fake:
            model.to_empty(device=device)

    with (
        fake_world(gpus, rank) as world,
        # Kernels are not launched: their rules for tensors without data run, and these need no GPU.
        assume_kernels_run(),
        # DTensor finds shapes by running operators on whole tensors, which no rank does.
        replaced(ShardingPropagator, FIND_SHAPES, recorder.unseen(getattr(ShardingPropagator, FIND_SHAPES))),
        replaced(token_exchange, "split_sizes", even_routing(routed, layout.expert, expert_load)),
    ):
        mesh = Mesh("cpu", layout)
        state, _ = build_state(recipe, config, world, mesh, seq_len=seq_len, compute=compute, initialize=without_values)
        model, optimizer = state.model, state.optimizer
        with fake:
            _make_state(optimizer)
            for parameter in model.parameters():
                ledger.note(to_local(parameter), memory.PARAMETERS)
            here, there = memory.optimizer_state(optimizer, offloaded=recipe.optim.offload)
            for _, value in here:
                ledger.note(to_local(value), memory.OPTIMIZER)
            for _, value in there:
                ledger.leave_out(to_local(value))
            recorder.follow(model, optimizer)
            names = ["input_ids", "shift_labels", *(["mtp_labels"] if layout.context > 1 else [])]
            batch = {name: torch.empty(shape, dtype=torch.int64) for name in names}
            if layout.context > 1:
                batch["next_input_ids"] = torch.empty((rows, 1), dtype=torch.int64)
            with recorder, ledger.following_resizes():
                try:
                    train_step(
                        state,
                        [batch] * min(micro_batches, 2),
                        world=world,
                        targets=recipe.batch.size * seq_len,
                        lr=recipe.optim.lr,
                        clip=recipe.optim.clip,
                        z_loss_weight=recipe.optim.z_loss,
                        mtp_loss_weight=recipe.optim.mtp_loss,
                        expert_bias_rate=recipe.experts.bias_rate,
                        layout=layout,
                        qk_clip=recipe.optim.qk_clip,
                    )
                except ValueError as error:
                    raise UserError(f"the recipe's model can't be run as it says: {error}") from None
        experts = {id(p) for m in model.modules() if isinstance(m, Experts) for p in m.parameters()}
        largest, outside = memory.gathered_bytes(model, getattr(torch, compute))
        total = _sum_up(recorder.tallies, micro_batches)
        return StepTrace(
            layout=layout,
            rows=rows,
            micro_batches=micro_batches,
            parameters=memory.local_bytes(model.parameters()),
            parameter_count=sum(p.numel() for p in model.parameters()),
            gradients=recorder.gradients or 0,
            optimizer=memory.local_bytes(value for _, value in here),
            offloaded=memory.local_bytes(value for _, value in there),
            experts={
                memory.PARAMETERS: memory.local_bytes(p for p in model.parameters() if id(p) in experts),
                memory.OPTIMIZER: memory.local_bytes(v for p, v in here if id(p) in experts),
                memory.GRADIENTS: recorder.expert_gradients,
            },
            expert_load=expert_load if layout.expert > 1 else 1.0,
            activations=recorder.activations,
            stretches=ledger.stretches,
            largest_layer=largest,
            outside_layers=outside,
            flops=dict(total.flops),
            moved=dict(total.moved),
            traffic=_traffic(total, Groups(_dimensions(mesh), domain)),
        )


def even_routing(rows: int, ranks: int, load: float) -> Callable[..., tuple[list[int], list[int]]]:
    """Stands in for `split_sizes` of token_exchange where tensors have no data.

    A rank deals its rows out evenly; it receives `load` times as many from each.
    """
    sent = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    received = [round(load * rows / ranks)] * ranks
    return lambda *_: (sent, received)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """AdamW makes its moments in its first step; every step after that runs with them in memory."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(p not in optimizer.state for p in parameters):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def _dimensions(mesh: Mesh) -> dict[str, str]:
    """What dimension of the mesh each of this rank's groups is of, by the group's name."""
    hybrid = mesh.layout.replicate > 1
    meshes = {
        "tensor": mesh.tensor,
        "expert": mesh.experts,
        "shard": mesh.parameters["shard"],
        "replicate": mesh.parameters["replicate"] if hybrid else None,
    }
    if mesh.experts is not None:
        meshes["expert shard"] = mesh.expert_parameters["expert_shard"]
        meshes["expert replicate"] = mesh.expert_parameters["replicate"] if hybrid else None
    found = {str(dimension.get_group().group_name): name for name, dimension in meshes.items() if dimension is not None}
    return found | ({mesh.context.group_name: "context"} if mesh.context is not None else {})


def _sum_up(tallies: list[_Tally], micro_batches: int) -> _Tally:
    """The whole step: the first micro-batch stands for all but the last."""
    total = _Tally()
    last = len(tallies) - 2  # the tally after it is the optimizer's
    for i, tally in enumerate(tallies):
        weight = micro_batches - 1 if i == 1 and last > 1 else 1
        for name in ("flops", "moved", "calls"):
            sums = getattr(total, name)
            for key, value in getattr(tally, name).items():
                sums[key] += weight * value
    return total


def _traffic(total: _Tally, groups: Groups) -> list[Traffic]:
    found: dict[tuple[str, str, tuple[int, ...]], Traffic] = {}
    for (call, phase), calls in total.calls.items():
        name, blocking = groups.describe(call, phase)
        new = Traffic(name, call.kind, len(call.ranks), groups.link(call.ranks), blocking)
        traffic = found.setdefault((name, call.kind, call.ranks), new)
        traffic.calls += calls
        traffic.sent += calls * call.sent
    return sorted(found.values(), key=lambda t: -t.sent)
