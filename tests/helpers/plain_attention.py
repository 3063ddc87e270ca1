"""The attention formulas of the papers, one head at a time: no code shared with the layers or their reference."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Causal softmax attention of one head of one row: q, k (S, D), v (S, Dv) -> (S, Dv).

    Token i sees itself and the ``window - 1`` tokens before it (all of them without a window).
    """
    outputs = []
    for i in range(len(q)):
        first = 0 if window is None else max(0, i + 1 - window)
        logits = torch.stack([q[i].dot(k[j]) * scale for j in range(first, i + 1)])
        weights = torch.exp(logits - logits.max())
        outputs.append((weights / weights.sum()) @ v[first : i + 1])
    return torch.stack(outputs)


def rotate(x: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotate-half rotary embedding of one head x (S, D) at positions 0, 1, ..., as complex numbers."""
    length, width = x.shape
    frequencies = base ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    turns = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.arange(length)[:, None] * frequencies)
    turned = torch.complex(x[:, : width // 2].double(), x[:, width // 2 :].double()) * turns
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension."""
    normalised = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight
