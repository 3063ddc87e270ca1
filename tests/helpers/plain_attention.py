"""The papers' attention, head by head: no code shared with the layers or the reference."""

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
    """Rotate-half rotary embedding of one head x (S, D), as complex numbers."""
    length, width = x.shape
    frequencies = base ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    turns = torch.polar(torch.tensor(1.0, dtype=torch.float64), torch.arange(length)[:, None] * frequencies)
    turned = torch.complex(x[:, : width // 2].double(), x[:, width // 2 :].double()) * turns
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Over the last dimension."""
    normalised = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    return normalised if weight is None else normalised * weight


def plain_diff_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    lam: Tensor,
    *,
    causal: bool,
    norm_weight: Tensor | None = None,
    gate: Tensor | None = None,
    out_scale: float = 1.0,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Differential attention of (B, S, H, D) tensors as one writes it down."""

    def attention(q: Tensor, k: Tensor) -> Tensor:
        heads = q.shape[2]
        q, k, values = (t.repeat_interleave(heads // t.shape[2], dim=2).transpose(1, 2) for t in (q, k, v))
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device)
            logits = logits.masked_fill(hidden.triu(1 + k.shape[-2] - q.shape[-2]), -torch.inf)
        return (logits.softmax(-1) @ values).transpose(1, 2)

    noise = attention(q2, k2).repeat_interleave(q1.shape[2] // q2.shape[2], dim=2)
    out = attention(q1, k1) - (lam[..., None] if lam.ndim else lam) * noise
    if norm_weight is not None:
        out = rms_norm(out, norm_weight, norm_eps)
    if gate is not None:
        out = out * torch.sigmoid(gate)
    return (out * out_scale).to(q1.dtype)
