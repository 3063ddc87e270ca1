"""Launching the Gluon backward kernel on plain tensors that ``availability.can_serve`` accepts."""

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from motif_kernels.impl.gluon.attention_backward import (
    KEYS,
    ROWS,
    _backward_kernel,
    _gather_rows_kernel,
    _round_kernel,
)
from motif_kernels.impl.gluon.tiles import descriptor
from motif_kernels.impl.triton.diff_attention import _dense, _grid, _lengths, _mask, backward_prepare
from motif_kernels.impl.triton.launching import cdiv, launch
from motif_kernels.types import AttentionInputs, AttentionOptions, Gradients, Sequences

_COLUMNS = 128  # of values that are summed in one sweep
_STAGES = 2  # tiles of queries that shared memory has room for


def backward(
    grad: Tensor,
    inputs: AttentionInputs,
    sequences: Sequences,
    options: AttentionOptions,
    difference: Tensor,
    noise: Tensor,
    lse_signal: Tensor,
    lse_noise: Tensor,
    inverse_rms: Tensor,
    gradients: Gradients,
) -> Gradients:
    """Fill the gradients."""
    inputs, sequences = _dense(inputs, sequences)
    q1, k1, q2, k2 = inputs[:4]
    d_a = torch.empty(difference.shape, dtype=q1.dtype, device=q1.device)
    d_o2 = None if inputs.noise is None else torch.empty_like(noise)
    deltas = torch.empty_like(lse_signal), torch.empty_like(lse_noise)
    gradients = backward_prepare(
        grad, inputs, options, difference, noise, lse_signal, inverse_rms, d_a, d_o2, deltas, gradients
    )
    call = inputs, sequences, options
    same_keys = k2 is k1  # whose gradients are added up
    to_k1, to_v = None if same_keys else gradients.k1, None if d_o2 is not None else gradients.v
    dk1, dv = _backward_of_a_map(*call, q1, k1, d_a, lse_signal, deltas[0], gradients.q1, to_k1, to_v, None)
    if q2 is not None and k2 is not None and d_o2 is not None:
        to_k2 = None if same_keys else gradients.k2
        of_noise = q2, k2, d_o2, lse_noise, deltas[1], gradients.q2
        dk2, dv = _backward_of_a_map(*call, *of_noise, to_k2, gradients.v, dv)
        if same_keys:
            dk1 = _sum(dk1, gradients.k1) + _sum(dk2, gradients.k1)
        else:
            _fill(gradients.k2, dk2)
    _fill(gradients.k1, dk1)
    _fill(gradients.v, dv)
    return gradients


def _sum(parts: Tensor, gradient: Tensor) -> Tensor:
    """Over the parts of each head of a gradient."""
    if parts.shape[-2] == gradient.shape[-2]:
        return parts
    return parts.unflatten(-2, (gradient.shape[-2], -1)).sum(-2)


def _fill(gradient: Tensor, parts: Tensor) -> None:
    if parts is not gradient:
        gradient.copy_(_sum(parts, gradient))


def _target(gradient: Tensor | None, of: Tensor, parts: int) -> Tensor:
    """Where a program writes its part: the gradient, if each of its heads is one part."""
    if gradient is not None and gradient.shape[-2] == parts:
        return gradient
    return of.new_empty(*of.shape[:-2], parts, of.shape[-1], dtype=torch.float32)


def _backward_of_a_map(
    inputs: AttentionInputs,
    sequences: Sequences,
    options: AttentionOptions,
    q: Tensor,
    k: Tensor,
    d_o: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    to_k: Tensor | None,
    to_v: Tensor | None,
    base: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fill dq; and to_k and to_v, if their heads are the parts.

    Gradients of keys and values are returned (..., parts, width): a part for each program's heads,
    those that share both. ``base`` is another map's gradient of values, to add to this one's.
    """
    v, heads, d = inputs.v, q.shape[-2], q.shape[-1]
    per_k, per_v = heads // k.shape[-2], heads // v.shape[-2]
    group = per_k if per_k == per_v else 1
    parts = heads // group
    tokens = q.shape[:-2].numel()
    columns = min(v.shape[-1], _COLUMNS)
    lengths = _lengths(inputs, sequences)
    on_queries = _grid(ROWS.value, sequences.max_seqlen_q, sequences.cu_seqlens_q, heads, q)
    on_keys = _grid(KEYS.value, sequences.max_seqlen_k, sequences.cu_seqlens_k, parts, k)
    tiles = tokens // ROWS.value + on_queries[2] + max(lengths[-1], 1)
    rows = q.new_empty(tiles * heads * 2, ROWS.value, dtype=torch.float32)
    sums = q.new_zeros(tiles * heads * ROWS.value * d, dtype=torch.float32)
    tickets = q.new_zeros(1 + tiles * heads, dtype=torch.int32)
    other = base if base is not None and base.shape[-2] != parts else None  # of other parts
    dk, dv = _target(to_k, k, parts), _target(to_v if other is None else None, v, parts)
    row_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    of_queries = sequences.cu_seqlens_q, lengths[0], tokens, lengths[-1]
    launch(_gather_rows_kernel, on_queries, lse, delta, of_queries[0], rows, *of_queries[1:], num_warps=2)
    launch(
        _backward_kernel,
        (on_keys[0] * on_keys[1] * on_keys[2],),
        descriptor(q, ROWS.value),
        descriptor(k, ROWS.value),
        descriptor(v, ROWS.value, columns),
        descriptor(d_o.view(*q.shape[:-1], v.shape[-1]), ROWS.value, columns),
        TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, ROWS.value], row_layout),
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        tickets,
        sums,
        dk,
        dv,
        base if other is None else None,
        *lengths,
        options.left,
        options.right,
        parts,
        tiles,
        on_keys[2],
        GROUP=group,
        HEADS_PER_K=per_k,
        HEADS_PER_V=per_v,
        STAGES=_STAGES,
        PIECES=cdiv(v.shape[-1], columns),
        num_warps=4,
        **_mask(options),
    )
    of_sums = {"SCALE": options.softmax_scale, "GROUP": group, "D": d}
    launch(_round_kernel, on_queries, sums, of_queries[0], dq, *of_queries[1:], tiles, **of_sums, num_warps=4)
    return dk, dv if other is None else _sum(dv, v) + _sum(other, v)
