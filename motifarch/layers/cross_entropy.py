"""Cross-entropy with the output projection inside: logits never exist whole."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

IGNORE_INDEX = -100

# Logits in a chunk: 2^24 float32 numbers are 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24


class CrossEntropy(NamedTuple):
    """The loss and its parts; float32 (float64) scalars."""

    loss: Tensor  # cross-entropy + z_weight * z, differentiable
    z_loss: Tensor  # the second term alone, detached
    targets: Tensor  # how many targets this call had, int64


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward takes the gradients too, chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: Tensor,
        z_weight: float,
        needs_grad: bool,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        # hidden (T, E) and weight (V, E) of one dtype, targets (T,), divisor (). With a group,
        # weight is this rank's part of the vocabulary's rows, as many on every rank.
        first = 0 if group is None else dist.get_rank(group) * weight.shape[0]
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        d_hidden = torch.zeros_like(hidden) if needs_grad else None
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if needs_grad else None
        total, total_z = (torch.zeros((), dtype=accumulate, device=hidden.device) for _ in range(2))
        chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            h, t = hidden[start : start + chunk], targets[start : start + chunk]
            ignored = t == IGNORE_INDEX
            logits = (h @ weight.t()).to(accumulate)
            index = (t - first)[:, None]
            elsewhere = (index < 0) | (index >= weight.shape[0])  # ignored, or in another rank's part
            index = index.masked_fill(elsewhere, 0)
            logsumexp = logits.logsumexp(dim=-1)
            target = logits.gather(1, index).masked_fill_(elsewhere, 0).squeeze(1)
            if group is not None:
                logsumexp, target = _over_all_parts(logsumexp, target, group)
            losses = logsumexp - target
            total += losses.masked_fill_(ignored, 0).sum()
            total_z += logsumexp.square().masked_fill_(ignored, 0).sum()
            if d_hidden is None or d_weight is None:
                continue
            # d(loss + w z)/dlogits = p (1 + 2 w logsumexp) - onehot, and 0 where there is no target
            d_logits = logits.sub_(logsumexp[:, None]).exp_()
            if z_weight:
                d_logits.mul_(1 + 2 * z_weight * logsumexp[:, None])
            d_logits.scatter_add_(1, index, elsewhere.to(accumulate).sub_(1))
            # Divided in float32, before it is rounded for the products.
            d_logits = d_logits.div_(divisor).masked_fill_(ignored[:, None], 0).to(h.dtype)
            d_hidden[start : start + chunk] = d_logits @ weight
            d_weight += d_logits.t() @ h
        if d_hidden is not None and d_weight is not None:
            if group is not None:
                dist.all_reduce(d_hidden, group=group)
            ctx.save_for_backward(d_hidden, d_weight.to(weight.dtype))
        z_loss = z_weight * total_z / divisor
        ctx.mark_non_differentiable(z_loss)
        return total / divisor + z_loss, z_loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in float32: rounding the scale itself to bfloat16 would tilt every gradient alike.
        d_hidden, d_weight = ((t.to(grad.dtype) * grad).to(t.dtype) for t in ctx.saved_tensors)
        return d_hidden, d_weight, None, None, None, None, None


def _over_all_parts(logsumexp: Tensor, target: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit (T,) over all parts of the vocabulary."""
    largest = logsumexp.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((logsumexp - largest).exp(), target))
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]


def _own_rows(weight: Any) -> tuple[ProcessGroup, Tensor]:
    """The ranks that share a DTensor's rows, and this rank's rows."""
    from torch.distributed.tensor import Shard  # takes half a second to import, and who has a DTensor has it

    ranks = weight.device_mesh.size()
    if weight.placements != (Shard(0),) or weight.shape[0] % ranks:
        raise ValueError(
            f"weight, {tuple(weight.shape)}, is spread as {weight.placements} over {ranks} ranks; its rows must be, in "
            "equal parts"
        )
    return weight.device_mesh.get_group(), weight.to_local()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: Tensor | float | None = None,
    z_loss_weight: float = 0.0,
) -> CrossEntropy:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` without ever holding all logits.

    A chunk of tokens is projected at a time; softmax and sums are in float32
    (float64 for float64 inputs).

    Args:
        hidden: (..., E) final hidden states.
        weight: (V, E) of the output projection, of hidden's dtype; or a DTensor of it whose rows
            are spread over the ranks of a one-dimensional mesh (tensor parallelism), each of which
            has the same hidden and targets.
        targets: (...) int64; ``IGNORE_INDEX`` (-100) where there is no target.
        num_items: divides the sums instead of the number of targets in this call: the count over
            all micro-batches and ranks, so that their losses add up to the mean of the global
            batch.
        z_loss_weight: weight of the mean squared log-sum-exp (PaLM, arXiv 2204.02311, section 5),
            which keeps logits small.

    Returns:
        The loss, its z term and the number of targets. Without any target the loss is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; it must be hidden's {tuple(hidden.shape)} but the last"
        )
    if hidden.shape[-1] != weight.shape[-1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype}; "
            "the last dimension and the dtype must be equal"
        )
    group = None
    if hasattr(weight, "device_mesh"):
        group, weight = _own_rows(weight)
    count = (targets != IGNORE_INDEX).sum()
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    divisor = count.clamp(min=1) if num_items is None else torch.as_tensor(num_items, device=hidden.device)
    # Asked here, for inside the function gradients are off and requires_grad says yes even under
    # no_grad.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss, z_loss = _LinearCrossEntropy.apply(
        hidden.flatten(0, -2), weight, targets.flatten(), divisor.to(accumulate), z_loss_weight, needs_grad, group
    )
    return CrossEntropy(loss, z_loss, count)
