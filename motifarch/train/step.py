"""One optimizer step over a global batch, and the validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from motifarch.data import PackedDataset, collate
from motifarch.decoder_layers import decoder_layers
from motifarch.layers import IGNORE_INDEX
from motifarch.optim import clip_gradients, clip_layers, step_if_finite, update_expert_biases
from motifarch.parallel import Layout, Mesh, World, prepare_micro_batch, shard_sequence
from motifarch.train.checkpoint import TrainState


@dataclass
class StepResult:
    """What a step measured: tensors on the device, which nobody has waited for."""

    loss: torch.Tensor
    """Mean cross-entropy over the global batch's targets, in nats."""
    z_loss: torch.Tensor
    """The z-loss's part of what was minimised."""
    grad_norm: torch.Tensor
    """Global gradient norm before clipping."""
    skipped: torch.Tensor
    """1 where loss or gradient was not finite or spiked, and nothing was updated; else 0."""
    lambdas: torch.Tensor | None
    """Mean lambda of each layer over the ranks, (layers,), or None for softmax attention."""
    spike: torch.Tensor | None = None
    """1 where the step was skipped as a spike, else 0; None without a spike guard."""
    expert_loads: Sequence[torch.Tensor] = ()
    """Of each layer with experts, (experts,): tokens that each got, over all ranks."""
    mtp_loss: torch.Tensor | None = None
    """Multi-token prediction's part of what was minimised; None of a model without."""
    expert_loss: torch.Tensor | None = None
    """The experts' balance and magnitude losses' part; None of a model without experts."""


def count_targets(micro_batches: Sequence[dict[str, Any]]) -> int:
    """The number of tokens that have a target."""
    return sum(int((batch["shift_labels"] != IGNORE_INDEX).sum()) for batch in micro_batches)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copies a micro-batch's tensors to a device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def train_step(
    state: TrainState,
    micro_batches: Sequence[dict[str, Any]],
    *,
    world: World,
    targets: int,
    lr: float,
    clip: float | None,
    z_loss_weight: float = 0.0,
    mtp_loss_weight: float = 0.2,
    expert_bias_rate: float = 0.0,
    layout: Layout | None = None,
    qk_clip: float | None = None,
) -> StepResult:
    """Accumulates gradients and updates the state, unless the step is not finite or spikes.

    Args:
        state: updated in place.
        micro_batches: this rank's part of the global batch (rows, or tokens of them), on the CPU.
        world: the ranks.
        targets: targets of the whole global batch, over all ranks.
        lr: learning rate of this step.
        clip: largest global gradient norm; None never clips.
        z_loss_weight: weight of the z-loss.
        mtp_loss_weight: weight of the cross-entropy of the token after the next one.
        expert_bias_rate: what the biases that experts are chosen by move by, towards equal loads.
        layout: how the ranks are arranged; by default each has rows of its own.
        qk_clip: bound of attention logits (MuonClip), for layers that record theirs; None for none.

    Returns:
        The step's measurements, the same on every rank.
    """
    # FSDP averages gradients over the ranks (those of tensor parallelism have the same ones), so
    # each rank divides its sum by its even share of the targets: the average is then the mean over
    # all targets, however unevenly the ranks hold them.
    layout = Layout(shard=world.size) if layout is None else layout
    share = torch.tensor(max(targets, 1) / layout.grad_reduce_size, device=world.device)
    weights = {"z_loss_weight": z_loss_weight, "mtp_loss_weight": mtp_loss_weight}
    experts = list(state.model.model.expert_layers().values())  # type: ignore[union-attr, operator]
    losses = torch.zeros(4, device=world.device)
    for i, batch in enumerate(micro_batches):
        prepare_micro_batch(state.model, layout, last=i == len(micro_batches) - 1)
        out = state.model(**to_device(batch, world.device), num_items_in_batch=share, **weights)
        out.loss.backward()
        total, parts = out.loss.detach(), (out.z_loss, out.mtp_loss, out.expert_loss)
        added = [torch.zeros_like(total) if part is None else part.detach() for part in parts]
        losses += torch.stack([total - sum(added), *added]).float()
    # Each rank has lambdas of its own tokens, of the last micro-batch: their mean stands for all.
    lambdas = state.model.last_lambdas()  # type: ignore[operator]
    means = losses if lambdas is None else torch.cat((losses, lambdas))
    dist.all_reduce(means)
    losses, lambdas = (means / world.size).tensor_split([len(losses)])

    grad_norm = clip_gradients(state.model.parameters(), clip)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    measured = torch.stack([losses.sum(), grad_norm])
    spike = None
    if state.spike_guard is not None:
        # Ranks that reduced in another order may differ in the last bit, and so in their verdict.
        dist.broadcast(measured, src=0)
        spike = state.spike_guard.check(*measured.unbind())
    skipped = step_if_finite(state.optimizer, measured, skip=spike)
    # The step has not read them, so what the biases were in it does not depend on the order.
    loads = update_expert_biases(experts, rate=expert_bias_rate, skip=skipped)
    if qk_clip is not None:
        clip_layers([layer.self_attn for layer in decoder_layers(state.model)], tau=qk_clip, skip=skipped)  # type: ignore[misc]
    state.optimizer.zero_grad()
    state.count_skipped(skipped if spike is None else skipped - spike)
    state.step += 1
    state.tokens += targets
    loss, z_loss, mtp_loss, expert_loss = losses
    return StepResult(
        loss,
        z_loss,
        grad_norm,
        skipped,
        lambdas if len(lambdas) else None,
        spike,
        loads,
        mtp_loss if state.model.model.mtp_layers else None,  # type: ignore[union-attr]
        expert_loss if experts else None,
    )


def spread_rows(datasets: Sequence[PackedDataset], sequences: int) -> list[tuple[PackedDataset, int]]:
    """So many rows over all splits together, evenly spread; fewer where there are fewer."""
    return [
        (dataset, i * len(dataset) // count)
        for dataset in datasets
        for count in [min(len(dataset), -(-sequences // len(datasets)))]
        for i in range(count)
    ]


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    datasets: Sequence[PackedDataset],
    *,
    world: World,
    sequences: int,
    micro_size: int,
    mesh: Mesh | None = None,
) -> float:
    """The mean cross-entropy over fixed validation rows, in nats/token.

    Of all validation splits together, so many sequences are taken (fewer where there are fewer),
    evenly spread and the same for any number of ranks, which share them, `micro_size` in a forward
    pass. Without a mesh, each rank takes rows of its own.
    """
    rows = spread_rows(datasets, sequences)
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    size, rank = (world.size, world.rank) if mesh is None else (mesh.layout.data_parallel_size, mesh.data_rank)
    for first in range(0, len(rows), micro_size * size):
        mine = rows[first + rank : first + micro_size * size : size]
        # Forward passes are collective: a rank without rows repeats one, with no targets.
        batch = collate([dataset[row] for dataset, row in mine or rows[:1]])
        if not mine:
            batch["shift_labels"] = torch.full_like(batch["shift_labels"], IGNORE_INDEX)
        if mesh is not None:
            batch = shard_sequence(batch, mesh.context_rank, mesh.layout.context)
        out = model(**to_device(batch, world.device), num_items_in_batch=torch.ones((), device=world.device))
        sums += torch.stack([out.loss.double(), sums.new_tensor(count_targets([batch]))])
    model.train()
    dist.all_reduce(sums)
    return float(sums[0] / sums[1])
