"""Attention with masks of the caller's own and dropout, which no kernel knows: each map by torch's
attention, which holds no map, and the epilogue.

Shapes: B batch, Sq queries, Sk keys, H query heads, Hs signal heads, Dv width of a value.
"""

from torch import Tensor

from motif_kernels import dispatch
from motif_kernels.combine import combine
from motif_kernels.impl.sdpa import attention as sdpa
from motif_kernels.types import AttentionInputs, AttentionOptions
from motifarch.layers.attention_maps import signal_and_noise_masks


def is_plain(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether torch's attention needs no mask to hide what the options do: a causal mask of its
    own, or none.
    """
    same_length = inputs.q1.shape[1] == inputs.k1.shape[1]
    return options.window_size == (-1, -1) or (options.window_size == (-1, 0) and same_length)


def attend_masked(
    inputs: AttentionInputs, mask: Tensor | None, options: AttentionOptions, dropout: float = 0.0
) -> Tensor:
    """Attention of (B, S, heads, width) tensors and what follows it.

    Args:
        inputs: of a batch.
        mask: (B or 1, H or 1, Sq, Sk): bool, True where a query sees a key, or floats that are
            added to the logits; None where :func:`is_plain`.
        options: with a mask all but the window, which the mask has.
        dropout: the share of each map's probabilities that are left out.

    Returns:
        Tensor (B, Sq, Hs, Dv); a fully masked row is 0.
    """
    of_signal = of_noise = mask
    if mask is not None:
        mask = mask.to(inputs.q1.dtype) if mask.is_floating_point() else mask
        of_signal, of_noise = signal_and_noise_masks(mask, inputs.noise_heads)

    def attend(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        causal = mask is None and options.right == 0
        return sdpa.attend(q, k, inputs.v, scale=options.softmax_scale, causal=causal, mask=mask, dropout=dropout)

    with dispatch.as_given(inputs.q1.device):
        return combine(
            attend(inputs.q1, inputs.k1, of_signal),
            None if inputs.noise is None else attend(inputs.noise.q, inputs.noise.k, of_noise),
            inputs.lam,
            norm_weight=inputs.norm_weight,
            norm_eps=options.norm_eps,
            out_scale=options.out_scale,
            gate=inputs.gate,
        )
