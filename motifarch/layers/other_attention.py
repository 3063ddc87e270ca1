"""Softmax attention that is not motif_kernels', such as one of transformers' interface, in one call
of signal and noise heads.

Shapes: B batch, S tokens, H query heads, Hs signal heads, D head_dim, Dv width of a value.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels import diff_combine
from motif_kernels.types import AttentionInputs, AttentionOptions


def attend_with(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: AttentionInputs,
    options: AttentionOptions,
    *,
    paired_kv: bool,
) -> Tensor:
    """Attention of (B, S, heads, width) tensors and what follows it.

    Args:
        attend: of queries (B, S, H, width) as q_proj has them, keys and values (B, keys, heads,
            width): (B, S, H, Dv).
        inputs: of a batch.
        options: those of the epilogue.
        paired_kv: signal and noise have keys of their own. Width is then 2 D: keys k1 and k2 side
            by side, and queries with zeros beside them.

    Returns:
        Tensor (B, S, Hs, Dv).
    """
    if inputs.noise is None:
        return attend(inputs.q1, inputs.k1, inputs.v)
    signal, noise = inputs.q1.unflatten(2, (inputs.noise_heads, -1)), inputs.noise.q.unsqueeze(3)
    key = inputs.k1
    if paired_kv:
        key, width = torch.cat((inputs.k1, inputs.noise.k), dim=-1), signal.shape[-1]
        signal, noise = F.pad(signal, (0, width)), F.pad(noise, (width, 0))
    out = attend(torch.cat((signal, noise), dim=3).flatten(2, 3), key, inputs.v)
    blocks = out.unflatten(2, (inputs.noise_heads, -1))
    return diff_combine(
        blocks[:, :, :, :-1].flatten(2, 3),
        blocks[:, :, :, -1],
        inputs.noise.lam,
        norm_weight=inputs.norm_weight,
        norm_eps=options.norm_eps,
        out_scale=options.out_scale,
        gate=inputs.gate,
    )
