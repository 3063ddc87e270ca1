"""Cross-entropy with the output projection inside: logits exist whole only where they are few."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


def next_labels(labels: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Each position's next label, (B, S) like ``labels``; ``IGNORE_INDEX`` for the last of a row,
    or of a packed document with bounds (documents + 1,) in the B * S positions.
    """
    shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is not None:
        last = cu_seqlens[1:].long() - 1
        shifted.view(-1)[last[last >= 0]] = IGNORE_INDEX
    return shifted


# Tokens in a chunk: so many that its logits take the bytes of the head's weight in float32, and in
# these bounds. Not fewer, for the chunks' gradients of the weight are summed in its own precision.
_CHUNK_TOKENS = (512, 2048)
# Logits at a time in float32: 2^24 numbers are 64 MiB, whatever the vocabulary. So few of a whole
# call are not cut, and so not projected twice.
_FLOAT32_ELEMENTS = 1 << 24


class CrossEntropy(NamedTuple):
    """The loss and its parts; float32 (float64) scalars."""

    loss: Tensor  # cross-entropy + z_weight * z, differentiable
    z_loss: Tensor  # the second term alone, detached
    targets: Tensor  # how many targets this call had, int64


class _SummedLoss(torch.autograd.Function):
    """The sums of cross-entropy and z over some tokens, from logits of any precision.

    Softmax and sums are in float32; of that, only what `_FLOAT32_ELEMENTS` allows exists at once.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, z_weight: float, first: int, group: ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        # logits (T, V) and targets (T,). With a group, logits are this rank's part of the
        # vocabulary, which begins with word number `first`.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logsumexp = torch.cat([part.to(dtype).logsumexp(dim=-1) for part in logits.split(_rows(logits))])
        index, elsewhere = _places(logits, targets, first)
        target = logits.gather(1, index[:, None]).squeeze(1).to(dtype).masked_fill_(elsewhere, 0)
        if group is not None:
            logsumexp, target = _over_all_parts(logsumexp, target, group)
        ignored = targets == IGNORE_INDEX
        z = z_weight * logsumexp.square().masked_fill_(ignored, 0).sum()
        total = (logsumexp - target).masked_fill_(ignored, 0).sum() + z
        ctx.save_for_backward(logits, targets, logsumexp)
        ctx.z_weight, ctx.first = z_weight, first
        ctx.mark_non_differentiable(z)
        return total, z

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # d(loss + w z)/dlogits = p (1 + 2 w logsumexp) - onehot, and 0 where there is no target.
        # Multiplied with what comes from outside (a loss scale, say) before it is rounded.
        logits, targets, logsumexp = ctx.saved_tensors
        index, elsewhere = _places(logits, targets, ctx.first)
        of_softmax, of_target = grad * (1 + 2 * ctx.z_weight * logsumexp), -grad * ~elsewhere
        ignored, rows = targets == IGNORE_INDEX, _rows(logits)
        d_logits = torch.empty_like(logits)
        for start in range(0, len(logits), rows):
            at = slice(start, start + rows)
            part = logits[at].to(logsumexp.dtype)  # what subtracts in another dtype would copy for itself
            part = part - logsumexp[at, None] if part.dtype == logits.dtype else part.sub_(logsumexp[at, None])
            part.exp_().mul_(of_softmax[at, None])
            part.scatter_add_(1, index[at, None], of_target[at, None])
            d_logits[at] = part.masked_fill_(ignored[at, None], 0)
        return d_logits, None, None, None, None


def _rows(logits: Tensor) -> int:
    """How many tokens' logits may exist in float32."""
    return max(1, _FLOAT32_ELEMENTS // max(1, logits.shape[1]))


def _places(logits: Tensor, targets: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Where in its logits each target is, and which are not there: ignored, or another rank's."""
    index = targets - first
    elsewhere = (index < 0) | (index >= logits.shape[1])
    return index.masked_fill(elsewhere, 0), elsewhere


def _over_all_parts(logsumexp: Tensor, target: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """The log-sum-exp and the target's logit (T,) over all parts of the vocabulary."""
    largest = logsumexp.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    sums = torch.stack(((logsumexp - largest).exp(), target))
    dist.all_reduce(sums, group=group)
    return sums[0].log() + largest, sums[1]


def _own_words(logits: Any) -> tuple[Tensor, int, ProcessGroup]:
    """This rank's part of a DTensor's logits (..., V), its first word, and the ranks."""
    from torch.distributed.tensor import Shard  # takes half a second to import, and who has a DTensor has it

    mesh, words = logits.device_mesh, logits.shape[-1]
    if mesh.ndim != 1 or logits.placements != (Shard(logits.ndim - 1),):
        raise ValueError(
            f"logits of {tuple(logits.shape)} are spread as {logits.placements} over {mesh.size()} ranks; their last "
            "dimension, the vocabulary, must be, over a mesh of one dimension"
        )
    group = mesh.get_group()
    # As DTensor cuts: equal parts, rounded up; the last may be short.
    return logits.to_local(), dist.get_rank(group) * -(-words // mesh.size()), group


def _summed_loss(
    head: Callable[[Tensor], Tensor], z_weight: float, hidden: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    logits, first, group = head(hidden), 0, None
    if hasattr(logits, "device_mesh"):
        logits, first, group = _own_words(logits)
    return _SummedLoss.apply(logits.flatten(0, -2), targets, z_weight, first, group)  # type: ignore[no-any-return, no-untyped-call]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    num_items: Tensor | float | None = None,
    z_loss_weight: float = 0.0,
) -> CrossEntropy:
    """Cross-entropy of ``softmax(hidden @ weight.T)`` without ever holding many logits.

    A chunk of tokens is projected at a time, and once more in the backward pass (the last chunk is
    not, nor are up to 2^24 logits of a call, which are one chunk); softmax and sums over tokens are
    in float32 (float64 for float64 inputs), the sum of the chunks' gradients of a weight in its
    dtype. An output projection that is given as a module is called, so that adapters, hooks,
    quantised weights and sharding units in it do what they do for logits, and gradients are taken
    in the backward pass, with the loss's scale.

    Args:
        hidden: (..., E) final hidden states.
        weight: the output projection: a module or function, which is called with (1, T, E) and
            gives logits (1, T, V); or its weight (V, E), of hidden's dtype. Logits (or the weight's
            rows) may be a DTensor that the ranks of a one-dimensional mesh share by words (tensor
            parallelism), each of which has the same hidden and targets.
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
    head = weight if callable(weight) else _projection(hidden, weight)
    accumulate = torch.promote_types(hidden.dtype, torch.float32)
    count = (targets != IGNORE_INDEX).sum()
    divisor = count.clamp(min=1) if num_items is None else torch.as_tensor(num_items, device=hidden.device)

    least, most = _CHUNK_TOKENS
    tokens = min(max(least, 4 * hidden.shape[-1] // hidden.element_size()), most)
    # A module that does not say how many words it has may have many.
    words = getattr(weight, "out_features", None) if callable(weight) else len(weight)
    if words and targets.numel() * words <= _FLOAT32_ELEMENTS:
        tokens = max(tokens, targets.numel())
    parts = list(
        zip(hidden.reshape(1, -1, hidden.shape[-1]).split(tokens, dim=1), targets.flatten().split(tokens), strict=True)
    )
    summed = partial(_summed_loss, head, z_loss_weight)
    # The backward pass begins with the last chunk: to let go of its logits would save nothing.
    sums = [checkpoint(summed, *part, use_reentrant=False) for part in parts[:-1]] + [summed(*parts[-1])]
    total, z = (torch.stack(values).sum() / divisor.to(accumulate) for values in zip(*sums, strict=True))
    return CrossEntropy(total, z, count)


def _projection(hidden: Tensor, weight: Any) -> Callable[[Tensor], Tensor]:
    """The product with a weight (V, E), which may be a DTensor."""
    if hidden.shape[-1] != weight.shape[-1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype} and weight {tuple(weight.shape)} {weight.dtype}; "
            "the last dimension and the dtype must be equal"
        )
    if not hasattr(weight, "device_mesh"):
        return partial(F.linear, weight=weight)
    from torch.distributed.tensor import DTensor, Replicate

    # Each rank's words give a part of the hidden states' gradient, which DTensor adds up.
    return lambda part: F.linear(DTensor.from_local(part, weight.device_mesh, (Replicate(),)), weight)
