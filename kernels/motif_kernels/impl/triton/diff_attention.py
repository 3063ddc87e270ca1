"""Launching the attention kernels on plain tensors.

In a launch table, a kernel's size is ``tuning.attention_size``; ``block_m`` queries by ``block_n``
keys is a tile. float32, which is for checks, has tables of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from motif_kernels.impl.triton.attention_backward import _keys_kernel, _prepare_kernel, _queries_kernel
from motif_kernels.impl.triton.attention_forward import _forward_kernel
from motif_kernels.ops.diff_attention import Gradients, Options, Results, Tensors
from motif_kernels.tuning import attention_size, launch_choice

LN_2 = 0.6931471805599453


def _power_of_two(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    d, dv = q.shape[-1], v.shape[-1]
    return {"D": d, "DV": dv, "BLOCK_D": _power_of_two(d), "BLOCK_DV": _power_of_two(dv)}


def _tiles(kernel: str, q: Tensor, v: Tensor) -> dict[str, int]:
    widths = _widths(q, v)
    if q.dtype == torch.float32:
        kernel += "_float32"
    choice = launch_choice(kernel, attention_size(widths["D"], widths["DV"], q.element_size()), q.device)
    return {
        "BLOCK_M": choice["block_m"],
        "BLOCK_N": choice["block_n"],
        "num_warps": choice["num_warps"],
        "num_stages": choice["num_stages"],
        **widths,
    }


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Between batch entries, tokens and heads."""
    if x is None:
        return 0, 0, 0
    return (0, x.stride(0), x.stride(1)) if x.ndim == 3 else (x.stride(0), x.stride(1), x.stride(2))


def _lam_strides(lam: Tensor) -> tuple[int, int, int]:
    """For lam of shape (), (Hs,), (total, Hs) or (B, S, Hs)."""
    return (0, 0, 0, *lam.stride())[-3:]  # type: ignore[return-value]


def _dense(tensors: Tensors) -> Tensors:
    """Copies of what the kernels read without a stride, where it has one; queries, keys and values
    were checked.
    """
    gate, weight = tensors.gate, tensors.norm_weight
    return tensors._replace(
        gate=gate.contiguous() if gate is not None and gate.stride(-1) != 1 else gate,
        norm_weight=None if weight is None else weight.contiguous(),
        cu_seqlens_q=None if tensors.cu_seqlens_q is None else tensors.cu_seqlens_q.contiguous(),
        cu_seqlens_k=None if tensors.cu_seqlens_k is None else tensors.cu_seqlens_k.contiguous(),
    )


def _batch(tensors: Tensors) -> int:
    return len(tensors.cu_seqlens_q) - 1 if tensors.cu_seqlens_q is not None else len(tensors.q1)


def _mask(options: Options) -> dict[str, Any]:
    return {
        "SCALE": options.softmax_scale,
        "SOFTCAP": options.softcap,
        "HAS_LEFT": options.left >= 0,
        "HAS_RIGHT": options.right >= 0,
    }


def _present(x: Tensor) -> Tensor | None:
    return x if x.numel() else None


def forward(tensors: Tensors, options: Options, results: Results) -> Results:
    """Fill the results that are not empty."""
    tensors = _dense(tensors)
    q1, k1, q2, k2, v, lam, norm_weight, gate, cu_seqlens_q, cu_seqlens_k = tensors
    noise_heads, heads = q2.shape[-2], q1.shape[-2]
    tiles = _tiles("attention_forward", q1, v)
    grid = (triton.cdiv(options.max_seqlen_q, tiles["BLOCK_M"]), noise_heads, _batch(tensors))
    scratch = q1.new_empty(q1.shape[:-2].numel(), noise_heads, v.shape[-1], dtype=torch.float32)
    max_signal = max_noise = None
    if options.max_logits:
        max_signal = q1.new_empty(grid[2] * grid[0], heads, dtype=torch.float32)
        max_noise = q1.new_empty(grid[2] * grid[0], noise_heads, dtype=torch.float32)
    _forward_kernel[grid](
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        norm_weight,
        gate,
        cu_seqlens_q,
        cu_seqlens_k,
        results.out,
        _present(results.difference),
        scratch,
        _present(results.noise),
        _present(results.lse_signal),
        _present(results.lse_noise),
        _present(results.inverse_rms),
        max_signal,
        max_noise,
        *_strides(q1),
        *_strides(k1),
        *_strides(q2),
        *_strides(k2),
        *_strides(v),
        *_lam_strides(lam),
        *_strides(gate),
        options.max_seqlen_q,
        options.max_seqlen_k,
        q1.shape[:-2].numel(),
        k1.shape[:-2].numel(),
        options.left,
        options.right,
        noise_heads,
        options.out_scale,
        NORM_EPS=options.norm_eps,
        GROUP=heads // noise_heads,
        SIGNALS_PER_K1=heads // k1.shape[-2],
        NOISES_PER_K2=noise_heads // k2.shape[-2],
        NOISES_PER_V=noise_heads // v.shape[-2],
        **_mask(options),
        **tiles,
    )
    if max_signal is None or max_noise is None:
        return results
    return results._replace(max_signal=max_signal.amax(0) * LN_2, max_noise=max_noise.amax(0) * LN_2)


def backward(
    grad: Tensor,
    tensors: Tensors,
    options: Options,
    difference: Tensor,
    noise: Tensor,
    lse_signal: Tensor,
    lse_noise: Tensor,
    inverse_rms: Tensor,
    gradients: Gradients,
) -> Gradients:
    """Fill the gradients."""
    tensors = _dense(tensors)
    q1, q2 = tensors.q1, tensors.q2
    group = q1.shape[-2] // q2.shape[-2]
    d_a = torch.empty(difference.shape, dtype=q1.dtype, device=q1.device)
    # With one signal head a noise head, or atomics, nothing reads the gradient of the noise map's
    # output.
    d_o2 = torch.empty_like(noise) if group > 1 and options.deterministic else None
    deltas = torch.empty_like(lse_signal), torch.empty_like(lse_noise)
    gradients = backward_prepare(
        grad, tensors, options, difference, noise, lse_signal, inverse_rms, d_a, d_o2, deltas, gradients
    )
    saved = (d_a, (lse_signal, lse_noise), deltas)
    if not options.deterministic:
        dq1 = torch.zeros(q1.shape, dtype=torch.float32, device=q1.device)
        dq2 = torch.zeros(q2.shape, dtype=torch.float32, device=q2.device)
        gradients = backward_keys(tensors, options, *saved, gradients, dq1, dq2)
        return gradients._replace(q1=dq1.to(q1.dtype), q2=dq2.to(q2.dtype))
    gradients = backward_keys(tensors, options, *saved, gradients, None, None)
    backward_queries(tensors, options, *saved, d_o2, gradients)
    return gradients


def backward_prepare(
    grad: Tensor,
    tensors: Tensors,
    options: Options,
    difference: Tensor,
    noise: Tensor,
    lse_signal: Tensor,
    inverse_rms: Tensor,
    d_a: Tensor,
    d_o2: Tensor | None,
    deltas: tuple[Tensor, Tensor],
    gradients: Gradients,
) -> Gradients:
    """The epilogue's backward: fills d_a, d_o2, the deltas and the gradients of lam and gate."""
    tokens, noise_heads, dv = noise.shape
    weight, gate = tensors.norm_weight, tensors.gate
    choice = launch_choice("attention_prepare", dv * noise.element_size(), noise.device)
    width = _power_of_two(dv)
    pairs = max(1, choice["tile_bytes"] // (width * noise.element_size()))
    programs = triton.cdiv(tokens * noise_heads, pairs * choice["tiles"])
    partial = torch.empty(programs, dv, dtype=torch.float32, device=noise.device) if weight is not None else None
    flat = grad.flatten(0, -3)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    flat_gate = None if gate is None else gate.flatten(0, -3)
    flat_lam = tensors.lam.flatten(0, 1) if tensors.lam.ndim == 3 else tensors.lam
    _prepare_kernel[(programs,)](
        flat,
        difference,
        noise,
        flat_lam,
        weight,
        flat_gate,
        _present(inverse_rms),
        lse_signal,
        d_a,
        d_o2,
        *deltas,
        gradients.lam,
        partial,
        _present(gradients.gate),
        tokens,
        noise_heads,
        *flat.stride()[:2],
        *(0, 0, *flat_lam.stride())[-2:],
        *(flat_gate.stride()[:2] if flat_gate is not None else (0, 0)),
        options.out_scale,
        GROUP=difference.numel() // noise.numel(),
        PAIRS=pairs,
        TILES=choice["tiles"],
        DV=dv,
        BLOCK_DV=width,
        num_warps=choice["num_warps"],
        maxnreg=choice.get("maxnreg"),
    )
    return gradients if partial is None else gradients._replace(norm_weight=partial.sum(0))


def backward_keys(
    tensors: Tensors,
    options: Options,
    d_a: Tensor,
    lse: tuple[Tensor, Tensor],
    deltas: tuple[Tensor, Tensor],
    gradients: Gradients,
    dq1: Tensor | None,
    dq2: Tensor | None,
) -> Gradients:
    """Gradients of keys and values; of queries too, into dq1 and dq2, if they are given."""
    q1, k1, q2, k2, v, lam, _, _, cu_seqlens_q, cu_seqlens_k = tensors
    noise_heads, heads = q2.shape[-2], q1.shape[-2]
    shared = k1.shape[-2] == k2.shape[-2] == v.shape[-2]
    noises = noise_heads // v.shape[-2] if shared else 1
    shares = noise_heads // noises

    def target(gradient: Tensor) -> Tensor:
        """Where a kernel writes: the gradient, or a part for each noise head, to be added up."""
        if gradient.shape[-2] == shares:
            return gradient
        return gradient.new_empty(*gradient.shape[:-2], shares, gradient.shape[-1], dtype=torch.float32)

    targets = [target(g) for g in (gradients.k1, gradients.k2, gradients.v)]
    tiles = _tiles("attention_backward_keys", q1, v)
    _keys_kernel[(triton.cdiv(options.max_seqlen_k, tiles["BLOCK_N"]), shares, _batch(tensors))](
        q1,
        k1,
        q2,
        k2,
        v,
        lam,
        d_a,
        *lse,
        *deltas,
        cu_seqlens_q,
        cu_seqlens_k,
        *targets,
        dq1,
        dq2,
        *_strides(q1),
        *_strides(k1),
        *_strides(q2),
        *_strides(k2),
        *_strides(v),
        *_lam_strides(lam),
        options.max_seqlen_q,
        options.max_seqlen_k,
        q1.shape[:-2].numel(),
        k1.shape[:-2].numel(),
        options.left,
        options.right,
        noise_heads,
        GROUP=heads // noise_heads,
        NOISES=noises,
        SIGNALS_PER_K1=heads // k1.shape[-2],
        NOISES_PER_K2=noise_heads // k2.shape[-2],
        NOISES_PER_V=noise_heads // v.shape[-2],
        **_mask(options),
        **tiles,
    )

    def total(part: Tensor, gradient: Tensor) -> Tensor:
        if part is gradient:
            return gradient
        return part.unflatten(-2, (gradient.shape[-2], -1)).sum(-2).to(gradient.dtype)

    totals = [total(t, g) for t, g in zip(targets, (gradients.k1, gradients.k2, gradients.v), strict=True)]
    return gradients._replace(k1=totals[0], k2=totals[1], v=totals[2])


def backward_queries(
    tensors: Tensors,
    options: Options,
    d_a: Tensor,
    lse: tuple[Tensor, Tensor],
    deltas: tuple[Tensor, Tensor],
    d_o2: Tensor | None,
    gradients: Gradients,
) -> None:
    """Gradients of queries: of both maps in one walk over the keys, or, given d_o2, of each by
    itself.
    """
    q1, k1, q2, k2, v, lam, _, _, cu_seqlens_q, cu_seqlens_k = tensors
    signal = (q1, k1, d_a, lse[0], deltas[0], gradients.q1)
    noise = (q2, k2, d_o2, lse[1], deltas[1], gradients.q2)
    both = d_o2 is None
    tiles = _tiles("attention_backward_queries", q1, v)
    for q, k, d_o, own_lse, delta, dq in [signal] if both else [signal, noise]:
        heads = q.shape[-2]
        _queries_kernel[(triton.cdiv(options.max_seqlen_q, tiles["BLOCK_M"]), heads, _batch(tensors))](
            q,
            k,
            q2 if both else None,
            k2 if both else None,
            v,
            lam if both else None,
            d_o,
            own_lse,
            lse[1] if both else None,
            delta,
            deltas[1] if both else None,
            cu_seqlens_q,
            cu_seqlens_k,
            dq,
            gradients.q2 if both else None,
            *_strides(q),
            *_strides(k),
            *_strides(q2 if both else None),
            *_strides(k2 if both else None),
            *_strides(v),
            *(_lam_strides(lam) if both else (0, 0, 0)),
            options.max_seqlen_q,
            options.max_seqlen_k,
            q1.shape[:-2].numel(),
            k1.shape[:-2].numel(),
            options.left,
            options.right,
            heads,
            BOTH_MAPS=both,
            HEADS_PER_K=heads // k.shape[-2],
            HEADS_PER_K_NOISE=heads // k2.shape[-2] if both else 1,
            HEADS_PER_V=heads // v.shape[-2],
            **_mask(options),
            **tiles,
        )
