"""The differential epilogue on a GPU: one forward and one backward kernel for any ratio, sub-norm,
gate or neither.

With ``A = O1 - lambda O2``, ``n = A r``, ``r = (mean(A^2) + eps)^-1/2`` and ``h`` the gradient that
reaches n:

    dA = r (h - n mean(h n)),    dO1 = dA
    dO2 = -sum over the group of lambda dA,    dlambda = -<dA, O2>

A program serves a few (token, noise head) pairs. It loads each noise head once and goes through the
signal heads that share it, so that noise is never repeated in memory and its gradient is summed in
registers. The gradient of the norm's weight is left as one row a program and added up afterwards in
a fixed order: no atomics.

In a launch table, the size is a head's bytes, ``tile_bytes`` are the bytes of noise that a program
holds and ``tiles`` is how many such tiles it goes through, one after another. ``maxnreg`` is a
limit of registers that a thread may use; without one the assembler aims for more programs at once,
and spills a register to get there.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from motif_kernels.impl.triton.launching import launch
from motif_kernels.reference import compute_dtype
from motif_kernels.tuning import launch_choice


@triton.jit
def _load_heads(pointer, token_stride, head_stride, tokens, heads, width, mask, DTYPE: tl.constexpr):
    """A tile (PAIRS, WIDTH) of ``heads`` of ``tokens`` (PAIRS,), in the compute dtype."""
    offsets = tokens * token_stride + heads * head_stride
    return tl.load(pointer + offsets[:, None] + width[None, :], mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _store_heads(pointer, head_count, tokens, heads, columns, width, mask, tile):
    """The same tile into a contiguous tensor (T, head_count, columns)."""
    offsets = (tokens * head_count + heads) * columns
    tl.store(pointer + offsets[:, None] + width[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _inverse_rms(a, columns, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a, axis=1, keep_dims=True) / columns + EPS)


@triton.jit
def _forward_kernel(
    signal_pointer,
    noise_pointer,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    out_pointer,
    pair_count,
    noise_heads,
    columns,
    signal_token,
    signal_head,
    noise_token,
    noise_head,
    lam_token,
    lam_head,
    gate_token,
    gate_head,
    out_scale,
    EPS: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if OUT_SCALE is not None:
        out_scale = OUT_SCALE
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    present = pairs < pair_count
    # Divided in 32 bits, which is many times faster; offsets need 64.
    tokens, noises = (pairs // noise_heads).to(tl.int64), (pairs % noise_heads).to(tl.int64)
    width = tl.arange(0, WIDTH)
    mask = present[:, None] & (width < columns)[None, :]
    noise = _load_heads(noise_pointer, noise_token, noise_head, tokens, noises, width, mask, DTYPE)
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + width, mask=width < columns, other=0.0).to(DTYPE)[None, :]
    for i in tl.static_range(GROUP):
        heads = noises * GROUP + i
        lam = tl.load(lam_pointer + tokens * lam_token + heads * lam_head, mask=present, other=0.0).to(DTYPE)
        signal = _load_heads(signal_pointer, signal_token, signal_head, tokens, heads, width, mask, DTYPE)
        a = signal - lam[:, None] * noise
        if weight_pointer is not None:
            a = a * _inverse_rms(a, columns, EPS) * weight
        if gate_pointer is not None:
            gate = _load_heads(gate_pointer, gate_token, gate_head, tokens, heads, width, mask, DTYPE)
            a = a / (1 + tl.exp(-gate))
        _store_heads(out_pointer, noise_heads * GROUP, tokens, heads, columns, width, mask, a * out_scale)


@triton.jit
def _backward_kernel(
    grad_pointer,
    signal_pointer,
    noise_pointer,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    d_signal_pointer,
    d_noise_pointer,
    d_lam_pointer,
    d_weight_pointer,
    d_gate_pointer,
    pair_count,
    noise_heads,
    columns,
    grad_token,
    grad_head,
    signal_token,
    signal_head,
    noise_token,
    noise_head,
    lam_token,
    lam_head,
    gate_token,
    gate_head,
    out_scale,
    EPS: tl.constexpr,
    OUT_SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
):
    if OUT_SCALE is not None:
        out_scale = OUT_SCALE
    program = tl.program_id(0)
    width = tl.arange(0, WIDTH)
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + width, mask=width < columns, other=0.0).to(DTYPE)[None, :]
        d_weight = tl.zeros([PAIRS, WIDTH], DTYPE)  # summed over pairs once, at the end: that takes barriers
    for tile in range(TILES):
        pairs = (program * TILES + tile) * PAIRS + tl.arange(0, PAIRS)
        present = pairs < pair_count
        tokens, noises = (pairs // noise_heads).to(tl.int64), (pairs % noise_heads).to(tl.int64)
        mask = present[:, None] & (width < columns)[None, :]
        noise = _load_heads(noise_pointer, noise_token, noise_head, tokens, noises, width, mask, DTYPE)
        d_noise = tl.zeros([PAIRS, WIDTH], DTYPE)
        for i in tl.range(GROUP):  # not unrolled: with every load hoisted to the top, registers would spill
            heads = noises * GROUP + i
            lam = tl.load(lam_pointer + tokens * lam_token + heads * lam_head, mask=present, other=0.0).to(DTYPE)
            g = _load_heads(grad_pointer, grad_token, grad_head, tokens, heads, width, mask, DTYPE) * out_scale
            if weight_pointer is not None or gate_pointer is not None:
                signal = _load_heads(signal_pointer, signal_token, signal_head, tokens, heads, width, mask, DTYPE)
                a = signal - lam[:, None] * noise
            if gate_pointer is not None:
                gate = _load_heads(gate_pointer, gate_token, gate_head, tokens, heads, width, mask, DTYPE)
                s = 1 / (1 + tl.exp(-gate))
                g *= s
                # d sigmoid = s (1 - s)
                d_gate = g * a * (1 - s)
                _store_heads(d_gate_pointer, noise_heads * GROUP, tokens, heads, columns, width, mask, d_gate)
            if weight_pointer is not None:
                r = _inverse_rms(a, columns, EPS)
                n = a * r
                d_weight += g * n
                g *= weight
                g = r * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / columns))
            _store_heads(d_signal_pointer, noise_heads * GROUP, tokens, heads, columns, width, mask, g)
            d_lam = -tl.sum(g * noise, axis=1)
            tl.store(d_lam_pointer + tokens * (noise_heads * GROUP) + heads, d_lam, mask=present)
            d_noise -= lam[:, None] * g
        _store_heads(d_noise_pointer, noise_heads, tokens, noises, columns, width, mask, d_noise)
    if weight_pointer is not None:
        d_weight_at = d_weight_pointer + program.to(tl.int64) * columns + width
        tl.store(d_weight_at, tl.sum(d_weight, axis=0), mask=width < columns)


def _tile(kernel: str, signal: Tensor, noise: Tensor) -> tuple[int, int, dict[str, Any]]:
    """Programs, tiles of each, and the constants of a launch."""
    tokens, noise_heads, columns = noise.shape
    choice = launch_choice(kernel, columns * signal.element_size(), signal.device)
    width = triton.next_power_of_2(columns)
    pairs = max(1, choice["tile_bytes"] // (width * signal.element_size()))
    pairs = min(pairs, triton.next_power_of_2(tokens * noise_heads))
    tiles = choice.get("tiles", 1)
    return (
        triton.cdiv(tokens * noise_heads, pairs * tiles),
        tiles,
        {
            "GROUP": signal.shape[1] // noise_heads,
            "PAIRS": pairs,
            "WIDTH": width,
            "DTYPE": tl.float64 if compute_dtype(signal) == torch.float64 else tl.float32,
            "num_warps": choice["num_warps"],
            "maxnreg": choice.get("maxnreg"),
        },
    )


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Between tokens and between heads."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _exact(out_scale: float, signal: Tensor) -> float | None:
    """The scale, for float64 a constant: Triton passes numbers in float32."""
    return out_scale if signal.dtype == torch.float64 else None


def forward(
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    *,
    norm_eps: float,
    out_scale: float,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue of signal (T, Hs, Dv) and noise (T, Hn, Dv).

    lam is () | (Hs,) | (T, Hs), norm_weight (Dv,) and gate (T, Hs, Dv).

    All but the last dimension may be strided.
    """
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    out = torch.empty(signal.shape, dtype=out_dtype, device=signal.device)
    programs, _, constants = _tile("diff_combine_forward", signal, noise)
    launch(
        _forward_kernel,
        (programs,),
        signal,
        noise,
        lam,
        norm_weight,
        gate,
        out,
        noise.shape[0] * noise.shape[1],
        noise.shape[1],
        noise.shape[2],
        *_strides(signal),
        *_strides(noise),
        *_strides(lam.expand(signal.shape[:2])),
        *_strides(gate),
        out_scale,
        EPS=norm_eps,
        OUT_SCALE=_exact(out_scale, signal),
        **constants,
    )
    return out


def backward(
    grad: Tensor,
    signal: Tensor,
    noise: Tensor,
    lam: Tensor,
    norm_weight: Tensor | None,
    gate: Tensor | None,
    *,
    norm_eps: float,
    out_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of signal, noise, lam (per token and head, (T, Hs)), norm_weight and gate."""
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    dtype, device = compute_dtype(signal), signal.device
    programs, tiles, constants = _tile("diff_combine_backward", signal, noise)
    d_signal = torch.empty(signal.shape, dtype=signal.dtype, device=device)
    d_noise = torch.empty(noise.shape, dtype=noise.dtype, device=device)
    d_lam = torch.empty(signal.shape[:2], dtype=dtype, device=device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=device) if gate is not None else None
    d_weight = torch.empty(programs, signal.shape[2], dtype=dtype, device=device) if norm_weight is not None else None
    launch(
        _backward_kernel,
        (programs,),
        grad,
        signal,
        noise,
        lam,
        norm_weight,
        gate,
        d_signal,
        d_noise,
        d_lam,
        d_weight,
        d_gate,
        noise.shape[0] * noise.shape[1],
        noise.shape[1],
        noise.shape[2],
        *_strides(grad),
        *_strides(signal),
        *_strides(noise),
        *_strides(lam.expand(signal.shape[:2])),
        *_strides(gate),
        out_scale,
        EPS=norm_eps,
        OUT_SCALE=_exact(out_scale, signal),
        TILES=tiles,
        **constants,
    )
    return d_signal, d_noise, d_lam, d_weight.sum(dim=0) if d_weight is not None else None, d_gate
