"""A few steps sharded, with DDP, and one skipped: functions that ranks run."""

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from helpers.models import tiny_model
from motifarch.data import BatchLoader, BatchSchedule, Mixture, MixtureComponent, PackedDataset
from motifarch.models.motif import MotifForCausalLM
from motifarch.optim import build_adamw, clip_gradients
from motifarch.parallel import Layout, Mesh, open_world, parallelize
from motifarch.train.checkpoint import TrainState
from motifarch.train.step import count_targets, train_step, validation_loss

STEPS, LR, CLIP, Z_LOSS = 4, 3e-3, 0.5, 1e-3


def build_model(tied: bool = True) -> MotifForCausalLM:
    sizes = {"vocab_size": 320, "intermediate_size": 64, "initializer_range": 0.02}
    return tiny_model(tie_word_embeddings=tied, **sizes)


def loader(data: Path, rank: int, ranks: int, micro: int) -> BatchLoader:
    component = MixtureComponent(PackedDataset.open(data))
    mixture = Mixture([component], seed=0, batch_schedule=BatchSchedule(8))
    return BatchLoader(mixture, rank=rank, world_size=ranks, micro_batch_size=micro, start_step=0, stop_step=STEPS)


def train_sharded(data: Path, output: Path, micro: int, options: dict[str, Any]) -> None:
    """STEPS steps with FSDP2; rank 0 saves losses, gradient norms and final weights."""
    with open_world() as world:
        model = parallelize(
            build_model(options.pop("tied", True)).train(), Mesh("cpu", Layout().resolve(world.size)), **options
        )
        state = TrainState(model, build_adamw(model, lr=LR))
        history = []
        for _, batches in loader(data, world.rank, world.size, micro):
            (targets,) = world.all_reduce_sum([count_targets(batches)])
            result = train_step(state, batches, world=world, targets=targets, lr=LR, clip=CLIP, z_loss_weight=Z_LOSS)
            history.append([result.loss.item(), result.z_loss.item(), result.grad_norm.item()])
        weights = {k: v.full_tensor() for k, v in model.state_dict().items() if isinstance(v, DTensor)}
        if world.is_main:
            torch.save((history, weights), output)


def train_ddp(data: Path, output: Path) -> None:
    """The same with DistributedDataParallel, plain AdamW groups and one micro-batch a rank."""
    with open_world() as world:
        model = build_model().train()
        ddp = DistributedDataParallel(model)
        optimizer = build_adamw(model, lr=LR)
        history = []
        for _, (batch,) in loader(data, world.rank, world.size, 8 // world.size):
            (targets,) = world.all_reduce_sum([count_targets([batch])])
            # DDP averages over the ranks too.
            out = ddp(**batch, num_items_in_batch=targets / world.size, z_loss_weight=Z_LOSS)
            out.loss.backward()
            parts = torch.stack([(out.loss - out.z_loss).detach(), out.z_loss.detach()]) / world.size
            dist.all_reduce(parts)
            history.append([*parts.tolist(), clip_gradients(model.parameters(), CLIP).item()])
            optimizer.step()
            optimizer.zero_grad()
        if world.is_main:
            torch.save((history, model.state_dict()), output)


def skip_one_step(data: Path) -> None:
    """Three steps, the second with an infinite z-loss on one rank's part only."""
    with open_world() as world:
        model = parallelize(build_model().train(), Mesh("cpu", Layout().resolve(world.size)))
        state = TrainState(model, build_adamw(model, lr=LR))

        def local(tree: Any) -> Any:
            if isinstance(tree, dict):
                return {k: local(v) for k, v in tree.items()}
            return tree.to_local().clone() if isinstance(tree, DTensor) else copy.deepcopy(tree)

        def same(a: Any, b: Any) -> bool:
            if isinstance(a, dict):
                return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
            return bool(torch.equal(a, b)) if isinstance(a, torch.Tensor) else bool(a == b)

        snapshots, skipped = [], []
        for step, batches in loader(data, world.rank, world.size, 2):
            # Every rank must skip, though the loss is infinite on the last one alone.
            poison = math.inf if step == 1 and world.rank == world.size - 1 else 0.0
            (targets,) = world.all_reduce_sum([count_targets(batches)])
            result = train_step(state, batches, world=world, targets=targets, lr=LR, clip=CLIP, z_loss_weight=poison)
            skipped.append(int(result.skipped))
            content = state.state_dict()
            snapshots.append(local({"model": content["model"], "optimizer": content["optimizer"]}))
        assert skipped == [0, 1, 0, 0]
        assert same(snapshots[0], snapshots[1])
        assert not same(snapshots[1], snapshots[2])
        assert state.nonfinite.tolist() == [1, 0, 1]
        assert state.step == 4


def validate(data: Path, output: Path, sequences: int) -> None:
    """The validation loss of the untrained model, saved by rank 0."""
    with open_world() as world:
        model = parallelize(build_model().train(), Mesh("cpu", Layout().resolve(world.size)))
        datasets = [PackedDataset.open(data, "validation")]
        loss = validation_loss(model, datasets, world=world, sequences=sequences, micro_size=2)
        assert model.training
        if world.is_main:
            torch.save(loss, output)
