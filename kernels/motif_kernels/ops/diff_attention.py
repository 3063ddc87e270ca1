"""Differential and softmax attention as one torch operator, forward and backward."""

import importlib
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from motif_kernels.ops import schema, take
from motif_kernels.ops.shortcut import differentiable, with_shortcut
from motif_kernels.types import AttentionInputs, AttentionOptions, Gradients, Results, Sequences

MAX_WIDTH = 256
MAX_BATCH = 65535
MAX_TOKEN_STRIDE = 1 << 23  # a tile of 128 tokens is addressed in 32 bits from its corner
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported_reason(inputs: AttentionInputs, sequences: Sequences | None = None) -> str | None:
    """Why the kernels cannot serve these tensors on any device, in words that follow "cannot
    serve", or None.
    """
    q1, k1, q2, k2, v = inputs[:5]
    if q1.dtype not in DTYPES:
        return f"dtype {q1.dtype}: the kernels take float16, bfloat16 and float32"
    for name, width in (("query and key", q1.shape[-1]), ("value", v.shape[-1])):
        if width > MAX_WIDTH:
            return f"{name} heads of width {width}: the kernels take at most {MAX_WIDTH}"
    if q2 is not None and q2.shape[-2] % k1.shape[-2]:
        return (
            f"{k1.shape[-2]} heads of k1 and {q2.shape[-2]} noise heads: the signal heads of a group must share their "
            "key head, so the noise heads must be a multiple of k1's"
        )
    if len(q1) > MAX_BATCH and (sequences is None or not sequences.is_packed):
        return f"a batch of {len(q1)}: the kernels take at most {MAX_BATCH}, a grid's limit; packed, any number"
    for name, tensor in (("q1", q1), ("k1", k1), ("q2", q2), ("k2", k2), ("v", v), ("gate", inputs.gate)):
        if tensor is not None and tensor.stride(-3) > MAX_TOKEN_STRIDE:
            return (
                f"{name} with tokens {tensor.stride(-3)} elements apart: the kernels take at most {MAX_TOKEN_STRIDE}; "
                f"call {name}.contiguous()"
            )
    return None


def has_epilogue(inputs: AttentionInputs, options: AttentionOptions) -> bool:
    """Whether the output is not the difference itself."""
    return inputs.norm_weight is not None or inputs.gate is not None or options.out_scale != 1.0


_CALL = AttentionInputs, Sequences, AttentionOptions


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, sequences, options, (save,) = take(arguments, *_CALL)
    inputs = _with_all_keys(inputs)
    results = empty_results(inputs, options, save)
    if results.out.numel() == 0 or inputs.v.numel() == 0:
        for tensor in results[:6]:
            tensor.zero_()
        results.lse_signal.fill_(torch.inf)
        results.lse_noise.fill_(torch.inf)
        return results[:6] + tuple(t.fill_(-torch.inf) for t in results[6:])
    with torch.cuda.device_of(inputs.q1):
        return tuple(_kernels(inputs).forward(inputs, sequences, options, results))


def _kernels(inputs: AttentionInputs, *, gluon: bool = True) -> ModuleType:
    """Whose ``forward`` and ``backward`` serve a call: Gluon's if allowed and possible."""
    from motif_kernels.impl.gluon import availability

    implementation = "gluon" if gluon and availability.can_serve(inputs) else "triton"
    return importlib.import_module(f"motif_kernels.impl.{implementation}.diff_attention")


def _with_all_keys(inputs: AttentionInputs) -> AttentionInputs:
    """k1 as k2 too, where it serves both maps: the operators take such a tensor once, and give its
    gradient once.
    """
    return inputs._replace(k2=inputs.k1) if inputs.q2 is not None and inputs.k2 is None else inputs


def empty_results(inputs: AttentionInputs, options: AttentionOptions, save: bool) -> Results:
    """Room for what the forward pass returns; ``save``: with what the backward pass needs."""
    q1, heads, v_head_dim = inputs.q1, inputs.q1.shape[-2], inputs.v.shape[-1]
    noise_heads = inputs.noise_heads
    tokens = math.prod(q1.shape[:-2])

    def empty(*shape: int, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
        return q1.new_empty(shape if wanted else (0,), dtype=dtype)

    save_noise = save and noise_heads > 0
    return Results(
        out=empty(*q1.shape[:-1], v_head_dim, dtype=q1.dtype),
        difference=empty(tokens, heads, v_head_dim, wanted=save and has_epilogue(inputs, options), dtype=q1.dtype),
        noise=empty(tokens, noise_heads, v_head_dim, wanted=save_noise, dtype=q1.dtype),
        lse_signal=empty(heads, tokens, wanted=save),
        lse_noise=empty(noise_heads, tokens, wanted=save_noise),
        inverse_rms=empty(heads, tokens, wanted=save and inputs.norm_weight is not None),
        max_signal=empty(heads, wanted=options.return_max_logits),
        max_noise=empty(noise_heads, wanted=options.return_max_logits),
    )


def _returns(values: type[Results] | type[Gradients]) -> str:
    return "(" + ", ".join(["Tensor"] * len(values._fields)) + ")"


_operator = torch.library.custom_op(
    "motif::diff_attention",
    _forward,
    mutates_args=(),
    schema=f"({schema(*_CALL)}, bool save) -> {_returns(Results)}",
)


@_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    inputs, _, options, (save,) = take(arguments, *_CALL)
    return tuple(empty_results(inputs, options, save))


def attend(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[Tensor, ...]:
    """The output, and the largest logits of signal and noise heads (empty where not asked for)."""
    call = inputs._replace(k2=None) if inputs.k2 is inputs.k1 else inputs
    results = diff_attention(*call, *sequences, *options, inputs.needs_grad)
    return results[0], results[6], results[7]


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, sequences, options, saved = take(arguments, *_CALL)
    gradients = empty_gradients(inputs)
    if grad.numel() == 0 or inputs.v.numel() == 0:
        return tuple(t.zero_() for t in gradients)
    with torch.cuda.device_of(grad):
        inputs = _with_all_keys(inputs)
        # After the last packed document may be NaN, which Gluon's backward kernel would spread.
        kernels = _kernels(inputs, gluon=not sequences.is_packed)
        return tuple(kernels.backward(grad, inputs, sequences, options, *saved, gradients=gradients))


def empty_gradients(inputs: AttentionInputs) -> Gradients:
    """Room for what the backward pass returns."""
    q1 = inputs.q1

    def like(tensor: Tensor | None) -> Tensor:
        return q1.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    lam = (math.prod(q1.shape[:-2]), q1.shape[-2]) if inputs.lam is not None else (0,)
    return Gradients(
        q1=like(q1),
        k1=like(inputs.k1),
        q2=like(inputs.q2),
        k2=like(inputs.k2),
        v=like(inputs.v),
        lam=q1.new_empty(lam, dtype=torch.float32),
        norm_weight=q1.new_empty(0 if inputs.norm_weight is None else inputs.v.shape[-1], dtype=torch.float32),
        gate=like(inputs.gate),
    )


_SAVED = "Tensor difference, Tensor noise, Tensor lse_signal, Tensor lse_noise, Tensor inverse_rms"
_backward_operator = torch.library.custom_op(
    "motif::diff_attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor grad, {schema(*_CALL)}, {_SAVED}) -> {_returns(Gradients)}",
)


_run_backward = with_shortcut(_backward_operator, _backward)


@_backward_operator.register_fake
def _(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return tuple(empty_gradients(take(arguments, *_CALL)[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    call, ctx.sequences, ctx.options, _ = take(inputs, *_CALL)
    results = Results(*output)
    difference = results.difference if has_epilogue(call, ctx.options) else results.out
    bounds = ctx.sequences.cu_seqlens_q, ctx.sequences.cu_seqlens_k
    ctx.sequences = ctx.sequences._replace(cu_seqlens_q=None, cu_seqlens_k=None)
    ctx.save_for_backward(*call, *bounds, difference, *results[2:6])


def _differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    # Read once: under activation checkpointing, a second look would recompute.
    inputs, (bounds_q, bounds_k, *saved) = take(ctx.saved_tensors, AttentionInputs)
    sequences = ctx.sequences._replace(cu_seqlens_q=bounds_q, cu_seqlens_k=bounds_k)
    gradients = Gradients(*_run_backward(grad, *inputs, *sequences, *ctx.options, *saved))
    lam, weight = inputs.lam, inputs.norm_weight
    if lam is not None:
        gradients = gradients._replace(lam=gradients.lam.view(*grad.shape[:-1]).sum_to_size(lam.shape).to(lam.dtype))
    if weight is not None:
        gradients = gradients._replace(norm_weight=gradients.norm_weight.to(weight.dtype))
    of_inputs = [g if t is not None else None for g, t in zip(gradients, inputs, strict=True)]
    return *of_inputs, *(None for _ in (*sequences, *ctx.options)), None


diff_attention = differentiable(_operator, _forward, _save, _differentiate)
