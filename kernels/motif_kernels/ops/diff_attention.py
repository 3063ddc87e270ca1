"""Differential attention as one torch operator: forward, backward, and what the one leaves for the
other.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_WIDTH = 256
MAX_BATCH = 65535
MAX_TOKEN_STRIDE = 1 << 23  # a tile of 128 tokens is addressed in 32 bits from its corner
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reason(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, gate: Tensor | None, cu_seqlens: Tensor | None
) -> str | None:
    """Why the kernels cannot serve these tensors, or None."""
    if q1.dtype not in DTYPES:
        return f"dtype {q1.dtype}: the kernels take float16, bfloat16 and float32"
    for name, width in (("query and key", q1.shape[-1]), ("value", v.shape[-1])):
        if width > MAX_WIDTH:
            return f"{name} heads of width {width}: the kernels take at most {MAX_WIDTH}"
    noise_heads = q2.shape[-2]
    if noise_heads % k1.shape[-2]:
        return (
            f"{k1.shape[-2]} heads of k1 and {noise_heads} noise heads: the signal heads of a group must share their "
            "key head, so the noise heads must be a multiple of k1's"
        )
    batch = len(q1) if cu_seqlens is None else len(cu_seqlens) - 1
    if batch > MAX_BATCH:
        return f"{batch} sequences in one call: the kernels take at most {MAX_BATCH}, a grid's limit"
    for name, tensor in (("q1", q1), ("k1", k1), ("q2", q2), ("k2", k2), ("v", v), ("gate", gate)):
        if tensor is not None and tensor.stride(-3) > MAX_TOKEN_STRIDE:
            return (
                f"{name} with tokens {tensor.stride(-3)} elements apart: the kernels take at most {MAX_TOKEN_STRIDE}; "
                f"call {name}.contiguous()"
            )
    return None


class Tensors(NamedTuple):
    """The tensors of one call: dense, (B, S, H, D), or packed, (total, H, D), with cu_seqlens.

    Arguments are :func:`motif_kernels.diff_attn_func`'s.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    lam: Tensor
    norm_weight: Tensor | None
    gate: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None


class Options(NamedTuple):
    """The numbers of one call."""

    max_seqlen_q: int
    max_seqlen_k: int
    softmax_scale: float
    left: int
    """Keys seen to the left of a query's position, -1 for all."""
    right: int
    """Likewise to the right; 0 is causal."""
    softcap: float
    norm_eps: float
    out_scale: float
    deterministic: bool
    save: bool
    """Leave what the backward pass needs."""
    max_logits: bool


class Results(NamedTuple):
    """What the forward pass returns; what was not asked for is empty. T tokens, H heads."""

    out: Tensor
    """(B, S, Hs, Dv), or (total, Hs, Dv)."""
    difference: Tensor
    """(T, Hs, Dv): signal - lambda * noise, rounded; empty where that is the output."""
    noise: Tensor
    """(T, Hn, Dv): the noise map's output, rounded."""
    lse_signal: Tensor
    """(Hs, T) float32, in units of log2."""
    lse_noise: Tensor
    """(Hn, T)."""
    inverse_rms: Tensor
    """(Hs, T), with the sub-norm."""
    max_signal: Tensor
    """(Hs,)."""
    max_noise: Tensor
    """(Hn,)."""


class Gradients(NamedTuple):
    """What the backward pass returns; lam's is per token and head, (T, Hs); absent ones are
    empty.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    lam: Tensor
    norm_weight: Tensor
    gate: Tensor


def has_epilogue(tensors: Tensors, options: Options) -> bool:
    """Whether the output is not the difference itself."""
    return tensors.norm_weight is not None or tensors.gate is not None or options.out_scale != 1.0


_TENSORS = (
    "Tensor q1, Tensor k1, Tensor q2, Tensor k2, Tensor v, Tensor lam, Tensor? norm_weight, Tensor? gate, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
)
_OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, float softmax_scale, int left, int right, float softcap, "
    "float norm_eps, float out_scale, bool deterministic, bool save, bool max_logits"
)
_SAVED = "Tensor difference, Tensor noise, Tensor lse_signal, Tensor lse_noise, Tensor inverse_rms"
_RETURNS = "(" + ", ".join(["Tensor"] * 8) + ")"

_COUNT = len(Tensors._fields)


def _implementation() -> Any:
    return importlib.import_module("..impl.triton.diff_attention", __package__)


def split_arguments(arguments: tuple[Any, ...]) -> tuple[Tensors, Options]:
    """The operator's arguments, with or without what follows them."""
    return Tensors(*arguments[:_COUNT]), Options(*arguments[_COUNT : _COUNT + len(Options._fields)])


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = split_arguments(arguments)
    results = empty_results(tensors, options)
    if results.out.numel() == 0 or tensors.v.numel() == 0:
        for tensor in results[:6]:
            tensor.zero_()
        results.lse_signal.fill_(torch.inf)
        results.lse_noise.fill_(torch.inf)
        return results[:6] + tuple(t.fill_(-torch.inf) for t in results[6:])
    with torch.cuda.device_of(tensors.q1):
        return tuple(_implementation().forward(tensors, options, results))


def empty_results(tensors: Tensors, options: Options) -> Results:
    """Room for what the forward pass returns."""
    q1, heads, width = tensors.q1, tensors.q1.shape[-2], tensors.v.shape[-1]
    noise_heads = tensors.q2.shape[-2]
    tokens = math.prod(q1.shape[:-2])

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return q1.new_empty(shape if wanted else (0,), dtype=dtype)

    save = options.save
    return Results(
        out=empty(*q1.shape[:-1], width, dtype=q1.dtype),
        difference=empty(tokens, heads, width, wanted=save and has_epilogue(tensors, options), dtype=q1.dtype),
        noise=empty(tokens, noise_heads, width, wanted=save, dtype=q1.dtype),
        lse_signal=empty(heads, tokens, wanted=save),
        lse_noise=empty(noise_heads, tokens, wanted=save),
        inverse_rms=empty(heads, tokens, wanted=save and tensors.norm_weight is not None),
        max_signal=empty(heads, wanted=options.max_logits),
        max_noise=empty(noise_heads, wanted=options.max_logits),
    )


diff_attention = torch.library.custom_op(
    "motif::diff_attention", _forward, mutates_args=(), schema=f"({_TENSORS}, {_OPTIONS}) -> {_RETURNS}"
)


@diff_attention.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_results(*split_arguments(arguments)))


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tensors, options = split_arguments(arguments)
    saved = arguments[_COUNT + len(Options._fields) :]
    gradients = empty_gradients(tensors)
    if grad.numel() == 0 or tensors.v.numel() == 0:
        return tuple(t.zero_() for t in gradients)
    with torch.cuda.device_of(grad):
        return tuple(_implementation().backward(grad, tensors, options, *saved, gradients))


def empty_gradients(tensors: Tensors) -> Gradients:
    """Room for what the backward pass returns."""
    q1 = tensors.q1

    def like(tensor: Tensor) -> Tensor:
        return tensor.new_empty(tensor.shape)

    return Gradients(
        q1=like(q1),
        k1=like(tensors.k1),
        q2=like(tensors.q2),
        k2=like(tensors.k2),
        v=like(tensors.v),
        lam=q1.new_empty((math.prod(q1.shape[:-2]), q1.shape[-2]), dtype=torch.float32),
        norm_weight=q1.new_empty(0 if tensors.norm_weight is None else tensors.v.shape[-1], dtype=torch.float32),
        gate=q1.new_empty(0) if tensors.gate is None else like(tensors.gate),
    )


_diff_attention_backward = torch.library.custom_op(
    "motif::diff_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_TENSORS}, {_OPTIONS}, {_SAVED}) -> {_RETURNS}",
)


@_diff_attention_backward.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(split_arguments(arguments)[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = split_arguments(inputs)
    results = Results(*output)
    ctx.mark_non_differentiable(*results[1:])
    difference = results.difference if has_epilogue(tensors, ctx.options) else results.out
    ctx.save_for_backward(*tensors, difference, *results[2:6])


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing, a second look would recompute
    tensors = Tensors(*saved[:_COUNT])
    gradients = Gradients(*_diff_attention_backward(grad, *saved[:_COUNT], *ctx.options, *saved[_COUNT:]))
    lam = tensors.lam
    d_lam = gradients.lam.view(*grad.shape[:-1]).sum_to_size(lam.shape).to(lam.dtype)
    weight = tensors.norm_weight
    return (
        *gradients[:5],
        d_lam,
        gradients.norm_weight.to(weight.dtype) if weight is not None else None,
        gradients.gate if tensors.gate is not None else None,
        None,
        None,
        *(None for _ in Options._fields),
    )


diff_attention.register_autograd(_differentiate, setup_context=_save)
