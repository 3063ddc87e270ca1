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

Heads may come in two pieces, as attention libraries that serve narrow values give them: each is
read, and its gradient written, where it is.

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

from motif_kernels.impl.triton.launching import cdiv, launch, next_power_of_2
from motif_kernels.reference import compute_dtype
from motif_kernels.tuning import launch_choice


@triton.jit
def _load_heads(
    pointer,
    rest_pointer,
    token_stride,
    head_stride,
    tokens,
    heads,
    width,
    mask,
    PIECE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile (PAIRS, WIDTH) of ``heads`` of ``tokens`` (PAIRS,), in the compute dtype.

    With a rest, the first PIECE columns are in one tensor and the others in that.
    """
    offsets = (tokens * token_stride + heads * head_stride)[:, None]
    if rest_pointer is None:
        tile = tl.load(pointer + offsets + width[None, :], mask=mask, other=0.0)
    else:
        first = (width < PIECE)[None, :]
        piece = tl.load(pointer + offsets + width[None, :], mask=mask & first, other=0.0)
        rest = tl.load(rest_pointer + offsets + (width - PIECE)[None, :], mask=mask & (first == 0), other=0.0)
        tile = tl.where(first, piece, rest)
    return tile.to(DTYPE)


@triton.jit
def _store_heads(pointer, rest_pointer, head_count, tokens, heads, columns, width, mask, tile, PIECE: tl.constexpr):
    """The same tile into a contiguous tensor (T, head_count, columns), or into two."""
    rows, tile = (tokens * head_count + heads)[:, None], tile.to(pointer.dtype.element_ty)
    if rest_pointer is None:
        tl.store(pointer + rows * columns + width[None, :], tile, mask=mask)
    else:
        first = (width < PIECE)[None, :]
        tl.store(pointer + rows * PIECE + width[None, :], tile, mask=mask & first)
        rest = rest_pointer + rows * (columns - PIECE) + (width - PIECE)[None, :]
        tl.store(rest, tile, mask=mask & (first == 0))


@triton.jit
def _inverse_rms(a, columns, EPS: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a, axis=1, keep_dims=True) / columns + EPS)


@triton.jit
def _forward_kernel(
    signal_pointer,
    signal_rest,
    noise_pointer,
    noise_rest,
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
    PIECE: tl.constexpr,
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
    noise = _load_heads(noise_pointer, noise_rest, noise_token, noise_head, tokens, noises, width, mask, PIECE, DTYPE)
    if weight_pointer is not None:
        weight = tl.load(weight_pointer + width, mask=width < columns, other=0.0).to(DTYPE)[None, :]
    for i in tl.static_range(GROUP):
        heads = noises * GROUP + i
        lam = tl.load(lam_pointer + tokens * lam_token + heads * lam_head, mask=present, other=0.0).to(DTYPE)
        signal = _load_heads(
            signal_pointer, signal_rest, signal_token, signal_head, tokens, heads, width, mask, PIECE, DTYPE
        )
        a = signal - lam[:, None] * noise
        if weight_pointer is not None:
            a = a * _inverse_rms(a, columns, EPS) * weight
        if gate_pointer is not None:
            gate = _load_heads(gate_pointer, None, gate_token, gate_head, tokens, heads, width, mask, PIECE, DTYPE)
            a = a / (1 + tl.exp(-gate))
        _store_heads(out_pointer, None, noise_heads * GROUP, tokens, heads, columns, width, mask, a * out_scale, PIECE)


@triton.jit
def _backward_kernel(
    grad_pointer,
    signal_pointer,
    signal_rest,
    noise_pointer,
    noise_rest,
    lam_pointer,
    weight_pointer,
    gate_pointer,
    d_signal_pointer,
    d_signal_rest,
    d_noise_pointer,
    d_noise_rest,
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
    PIECE: tl.constexpr,
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
        noise = _load_heads(
            noise_pointer, noise_rest, noise_token, noise_head, tokens, noises, width, mask, PIECE, DTYPE
        )
        d_noise = tl.zeros([PAIRS, WIDTH], DTYPE)
        for i in tl.range(GROUP):  # not unrolled: with every load hoisted to the top, registers would spill
            heads = noises * GROUP + i
            lam = tl.load(lam_pointer + tokens * lam_token + heads * lam_head, mask=present, other=0.0).to(DTYPE)
            g = (
                _load_heads(grad_pointer, None, grad_token, grad_head, tokens, heads, width, mask, PIECE, DTYPE)
                * out_scale
            )
            if weight_pointer is not None or gate_pointer is not None:
                signal = _load_heads(
                    signal_pointer, signal_rest, signal_token, signal_head, tokens, heads, width, mask, PIECE, DTYPE
                )
                a = signal - lam[:, None] * noise
            if gate_pointer is not None:
                gate = _load_heads(gate_pointer, None, gate_token, gate_head, tokens, heads, width, mask, PIECE, DTYPE)
                s = 1 / (1 + tl.exp(-gate))
                g *= s
                # d sigmoid = s (1 - s)
                d_gate = g * a * (1 - s)
                _store_heads(
                    d_gate_pointer, None, noise_heads * GROUP, tokens, heads, columns, width, mask, d_gate, PIECE
                )
            if weight_pointer is not None:
                r = _inverse_rms(a, columns, EPS)
                n = a * r
                d_weight += g * n
                g *= weight
                g = r * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / columns))
            _store_heads(
                d_signal_pointer, d_signal_rest, noise_heads * GROUP, tokens, heads, columns, width, mask, g, PIECE
            )
            d_lam = -tl.sum(g * noise, axis=1)
            tl.store(d_lam_pointer + tokens * (noise_heads * GROUP) + heads, d_lam, mask=present)
            d_noise -= lam[:, None] * g
        _store_heads(d_noise_pointer, d_noise_rest, noise_heads, tokens, noises, columns, width, mask, d_noise, PIECE)
    if weight_pointer is not None:
        d_weight_at = d_weight_pointer + program.to(tl.int64) * columns + width
        tl.store(d_weight_at, tl.sum(d_weight, axis=0), mask=width < columns)


def _tile(kernel: str, signal: Tensor, noise: Tensor, columns: int) -> tuple[int, int, dict[str, Any]]:
    """Programs, tiles of each, and the constants of a launch over heads so wide."""
    tokens, noise_heads, piece = noise.shape
    choice = launch_choice(kernel, columns * signal.element_size(), signal.device)
    width = next_power_of_2(columns)
    pairs = max(1, choice["tile_bytes"] // (width * signal.element_size()))
    pairs = min(pairs, next_power_of_2(tokens * noise_heads))
    tiles = choice.get("tiles", 1)
    return (
        cdiv(tokens * noise_heads, pairs * tiles),
        tiles,
        {
            "GROUP": signal.shape[1] // noise_heads,
            "PAIRS": pairs,
            "WIDTH": width,
            "PIECE": piece,
            "DTYPE": tl.float64 if compute_dtype(signal) == torch.float64 else tl.float32,
            "num_warps": choice["num_warps"],
            "maxnreg": choice.get("maxnreg"),
        },
    )


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Between tokens and between heads."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _columns(x: Tensor, rest: Tensor | None) -> int:
    return x.shape[2] + (0 if rest is None else rest.shape[2])


def _room(x: Tensor | None) -> Tensor | None:
    """For the gradient of x."""
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)


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
    signal_rest: Tensor | None = None,
    noise_rest: Tensor | None = None,
) -> Tensor:
    """The epilogue of signal (T, Hs, Dv) and noise (T, Hn, Dv).

    With rests, which are contiguous then as they are, both hold the first columns of each head, and
    these the others.

    lam is () | (Hs,) | (T, Hs), norm_weight (Dv,) and gate (T, Hs, Dv).

    All but the last dimension may be strided.
    """
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    columns = _columns(signal, signal_rest)
    out = torch.empty(*signal.shape[:2], columns, dtype=out_dtype, device=signal.device)
    programs, _, constants = _tile("diff_combine_forward", signal, noise, columns)
    launch(
        _forward_kernel,
        (programs,),
        signal,
        signal_rest,
        noise,
        noise_rest,
        lam,
        norm_weight,
        gate,
        out,
        noise.shape[0] * noise.shape[1],
        noise.shape[1],
        columns,
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
    signal_rest: Tensor | None = None,
    noise_rest: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of signal, noise, lam (of each token and head, (T, Hs)), weight, gate and rests."""
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    dtype, device = compute_dtype(signal), signal.device
    columns = _columns(signal, signal_rest)
    programs, tiles, constants = _tile("diff_combine_backward", signal, noise, columns)
    d_signal, d_signal_rest = _room(signal), _room(signal_rest)
    d_noise, d_noise_rest = _room(noise), _room(noise_rest)
    d_lam = torch.empty(signal.shape[:2], dtype=dtype, device=device)
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=device) if gate is not None else None
    d_weight = torch.empty(programs, columns, dtype=dtype, device=device) if norm_weight is not None else None
    launch(
        _backward_kernel,
        (programs,),
        grad,
        signal,
        signal_rest,
        noise,
        noise_rest,
        lam,
        norm_weight,
        gate,
        d_signal,
        d_signal_rest,
        d_noise,
        d_noise_rest,
        d_lam,
        d_weight,
        d_gate,
        noise.shape[0] * noise.shape[1],
        noise.shape[1],
        columns,
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
    d_weight = None if d_weight is None else d_weight.sum(dim=0)
    return d_signal, d_noise, d_lam, d_weight, d_gate, d_signal_rest, d_noise_rest
