"""Motif-3's losses by loops, to compare a training loop with; see motif_3_reference.py."""

import torch
from torch import Tensor

IGNORED = -100  # a target that no loss counts


def shifted_targets(
    labels: Tensor, ahead: int, attention_mask: Tensor | None = None, document_ids: Tensor | None = None
) -> Tensor:
    """Each position's target, the label so many tokens ahead.

    Args:
        labels: Token ids, or IGNORED, not shifted, (B, S).
        ahead: 1 for the model, 2 for the MTP layer.
        attention_mask: 0 where a token is padding, (B, S).
        document_ids: (B, S).

    Returns:
        (B, S); IGNORED past the end, out of the document, and at and into padding.
    """
    targets = torch.full_like(labels, IGNORED)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - ahead):
            real = attention_mask is None or bool(attention_mask[b, t : t + ahead + 1].all())
            together = document_ids is None or bool((document_ids[b, t : t + ahead + 1] == document_ids[b, t]).all())
            if real and together:
                targets[b, t] = labels[b, t + ahead]
    return targets


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over counted targets (B, S) of -log p, from logits (B, S, V)."""
    terms = []
    for b, t in (targets != IGNORED).nonzero().tolist():
        terms.append(torch.logsumexp(logits[b, t], 0) - logits[b, t, targets[b, t]])
    return torch.stack(terms).mean()


def mtp_loss(mtp_logits: Tensor, targets: Tensor, weight: float = 0.2) -> Tensor:
    """The MTP layer's part of the loss.

    Args:
        mtp_logits: (B, S - 1, V).
        targets: shifted_targets(labels, 2), (B, S).
        weight: §8.
    """
    # Reading (§8): the mean is over the MTP layer's own targets, fewer than the model's.
    return weight * cross_entropy(mtp_logits, targets[:, :-1])


def z_loss(logits: Tensor, targets: Tensor, coefficient: float) -> Tensor:
    """Mean over counted targets (B, S) of log(Z)^2, Z the softmax's denominator of (B, S, V)."""
    # Reading: the notes have no z-loss. This is PaLM's, on the model's logits.
    terms = [torch.logsumexp(logits[b, t], 0) ** 2 for b, t in (targets != IGNORED).nonzero().tolist()]
    return coefficient * torch.stack(terms).mean()


def balance_loss(scores: Tensor, choices: Tensor, coefficient: float, attention_mask: Tensor | None = None) -> Tensor:
    """One layer's sequence-wise balance loss.

    Args:
        scores: Without the selection bias, (B, S, E).
        choices: (B, S, k).
        coefficient: The layer's.
        attention_mask: 0 where a token is padding, (B, S).
    """
    # Reading (§6): a sequence is a row, with all documents packed in it. Its counts are of the
    # experts chosen, so with the selection bias. Layers are summed; a padded token counts nowhere.
    batch, length, experts = scores.shape
    top_k = choices.shape[-1]
    sequences = []
    for b in range(batch):
        tokens = [t for t in range(length) if attention_mask is None or attention_mask[b, t]]
        loss = scores.new_zeros(())
        for e in range(experts):
            count = sum(int((choices[b, t] == e).sum()) for t in tokens)
            share = torch.stack([scores[b, t, e] / scores[b, t].sum() for t in tokens]).mean()
            loss = loss + experts / (top_k * len(tokens)) * count * share
        sequences.append(loss)
    return coefficient * torch.stack(sequences).mean()


def ffn_magnitude_loss(
    y: Tensor, coefficient: float = 2e-4, threshold: float = 128.0, attention_mask: Tensor | None = None
) -> Tensor:
    """One layer's loss on values of y (B, S, hidden) that are far from 0."""
    # Reading (§6): y is all that the sublayer returns, routed and shared together, before mHC.
    # "last layer 1024" is that layer's threshold.
    terms = []
    for b in range(y.shape[0]):
        for t in range(y.shape[1]):
            if attention_mask is None or attention_mask[b, t]:
                terms.append(torch.relu(y[b, t].abs() - threshold) ** 2)
    return coefficient * torch.stack(terms).mean()


def expert_bias_step(counts: Tensor, coefficient: float) -> Tensor:
    """What is added to expert_bias (E,) after the experts got so many tokens (E,)."""
    counts = counts.double()
    delta = coefficient * torch.sign(counts.mean() - counts)
    return delta - delta.mean()
