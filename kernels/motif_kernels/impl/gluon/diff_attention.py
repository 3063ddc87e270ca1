"""Launching the Gluon attention kernels, on plain tensors that ``availability.can_serve`` takes."""

import torch
from torch import Tensor

from motif_kernels.impl.gluon.attention_forward import TILE, _forward_kernel
from motif_kernels.impl.gluon.attention_walk import ROWS
from motif_kernels.impl.gluon.diff_attention_backward import backward
from motif_kernels.impl.gluon.tiles import descriptor
from motif_kernels.impl.triton.diff_attention import (
    LN_2,
    _dense,
    _grid,
    _groups,
    _heads,
    _lam_strides,
    _lengths,
    _mask,
    _present,
    _strides,
)
from motif_kernels.impl.triton.launching import launch
from motif_kernels.types import AttentionInputs, AttentionOptions, Results, Sequences

__all__ = ["backward", "forward"]

# For each pair of widths: keys of a tile, and how many tiles shared memory has room for.
_TILES = {(64, 64): (128, 4), (64, 128): (128, 3), (128, 128): (64, 4), (128, 256): (64, 3)}
# Bytes of keys and values that programs side by side may read: they should find them in the cache.
_CACHE = 32 << 20


def _programs(device: torch.device) -> int:
    """One for each multiprocessor, whose shared memory has no room for a second; where there is no
    GPU, for who compiles or emulates, two.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions, results: Results) -> Results:
    """Fill the results that are not empty."""
    inputs, sequences = _dense(inputs, sequences)
    q1, k1, q2, k2, v, lam, norm_weight, gate = inputs
    groups, heads, width = _groups(inputs), q1.shape[-2], v.shape[-1]
    blocks, _, batch = _grid(TILE.value, sequences.max_seqlen_q, sequences.cu_seqlens_q, groups, q1)
    programs = min(_programs(q1.device), blocks * groups * batch)
    keys, stages = _TILES[q1.shape[-1], width]
    of_a_key = (q1.shape[-1] * (1 if lam is None else 2) + width) * q1.element_size()
    scratch = max_signal = max_noise = None
    if lam is not None:
        scratch = q1.new_empty(programs * TILE.value, width, dtype=torch.float32)
    if options.return_max_logits:
        parts = blocks * batch * (TILE.value // ROWS.value)
        max_signal = q1.new_full((parts, heads), -torch.inf, dtype=torch.float32)
        max_noise = q1.new_full((parts, inputs.noise_heads), -torch.inf, dtype=torch.float32)

    def tiles(x: Tensor | None, rows: int) -> object:
        return None if x is None else descriptor(x, rows)

    launch(
        _forward_kernel,
        (programs,),
        tiles(q1, ROWS.value),
        tiles(k1, keys),
        tiles(q2, ROWS.value),
        tiles(k2, keys),
        tiles(v, keys),
        lam,
        norm_weight,
        gate,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        results.out,
        _present(results.difference),
        scratch,
        _present(results.noise),
        _present(results.lse_signal),
        _present(results.lse_noise),
        _present(results.inverse_rms),
        max_signal,
        None if max_noise is None else _present(max_noise),
        *_lam_strides(lam),
        *_strides(gate),
        *_lengths(inputs, sequences),
        options.left,
        options.right,
        blocks,
        groups,
        batch,
        max(1, _CACHE // (k1.shape[-3] * of_a_key)),
        options.out_scale,
        NORM_EPS=options.norm_eps,
        **_heads(inputs),
        **_mask(options),
        STAGES=stages,
        num_warps=4,
    )
    if max_signal is None or max_noise is None:
        return results
    return results._replace(max_signal=max_signal.amax(0) * LN_2, max_noise=max_noise.amax(0) * LN_2)
