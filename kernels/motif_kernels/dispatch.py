"""Who serves an attention call: which backends can, which is taken, and how each is run."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from motif_kernels import latent, reference, tuning
from motif_kernels.checks import check_attention, check_cu_seqlens
from motif_kernels.combine import combine
from motif_kernels.impl.flash import attention as flash
from motif_kernels.ops import blocked_attention, is_exporting, sdpa
from motif_kernels.ops import diff_attention as fused
from motif_kernels.types import AttentionInputs, AttentionOptions, Sequences

# Keys up to which blocked products are the faster on a CPU where no heads share keys.
MAX_BLOCKED_KEYS = 2048

Attend = Callable[[Tensor, Tensor, Tensor, Sequences, AttentionOptions], Tensor | list[Tensor]]


def _composed(
    attend: Attend, inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions
) -> tuple[Tensor, ...]:
    """Each map by a library's softmax attention, which may come in pieces, and the epilogue."""
    out = attend(inputs.q1, inputs.k1, inputs.v, sequences, options)
    noise = inputs.noise
    o_noise = None if noise is None else attend(noise.q, noise.k, inputs.v, sequences, options)
    if noise is not None or fused.has_epilogue(inputs, options):
        out = combine(
            out,
            o_noise,
            inputs.lam,
            norm_weight=inputs.norm_weight,
            norm_eps=options.norm_eps,
            out_scale=options.out_scale,
            gate=inputs.gate,
        )
    return (out if isinstance(out, Tensor) else out[0] if len(out) == 1 else torch.cat(out, dim=-1),)


def _sdpa(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[Tensor, ...]:
    return _composed(sdpa.attention, inputs, sequences, options)


def _cpu(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[Tensor, ...]:
    return _composed(blocked_attention.attention, inputs, sequences, options)


def _cpu_unsupported_reason(inputs: AttentionInputs, *_: object) -> str | None:
    device = inputs.q1.device
    return None if device.type == "cpu" else f"tensors on {device}: it serves CPUs"


def _flash(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[Tensor, ...]:
    return _composed(flash.pieces, inputs, sequences, options)


def _triton_unsupported_reason(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> str | None:
    from motif_kernels import machine

    reason = machine.triton_unsupported_reason(inputs.q1.device)
    return reason or fused.unsupported_reason(inputs, sequences)


class _Backend(NamedTuple):
    run: Callable[[AttentionInputs, Sequences, AttentionOptions], tuple[Tensor, ...]]
    """Gives the output and, where asked for, the largest signal logits and noise logits."""
    library: str
    """For people."""
    serves: frozenset[str]
    """Which of the optional fields of inputs and options it knows; it does not serve any other."""
    unsupported_reason: Callable[[AttentionInputs, Sequences, AttentionOptions], str | None]
    """Why else it cannot serve a call, in words that go on from "cannot serve"; None if it can."""


_EPILOGUE = frozenset({"norm_weight", "gate"})
_BACKENDS = {
    "reference": _Backend(
        reference.attend, "the reference", _EPILOGUE | {"softcap", "return_max_logits"}, lambda *_: None
    ),
    "sdpa": _Backend(_sdpa, "torch's scaled_dot_product_attention", _EPILOGUE, lambda *_: None),
    "cpu": _Backend(_cpu, "attention by blocked products", _EPILOGUE, _cpu_unsupported_reason),
    "flash": _Backend(_flash, "flash-attn", _EPILOGUE | {"softcap"}, flash.unsupported_reason),
    "triton": _Backend(
        fused.attend, "the fused kernel", _EPILOGUE | {"softcap", "return_max_logits"}, _triton_unsupported_reason
    ),
}
BACKENDS = ("auto", *_BACKENDS)


def unsupported_reason(
    backend: str, inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions
) -> str | None:
    """Why a backend cannot serve a call, in words that follow "cannot serve"; None if it can."""
    _, library, serves, further_reason = _BACKENDS[backend]
    for value in (inputs, options):
        for name, default in value._field_defaults.items():
            given = getattr(value, name)
            if name not in serves and given is not default and given != default:
                return f"{name}={given}: {library} does not have it"
    return further_reason(inputs, sequences, options)


def choose(backend: str, inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> str:
    """Resolve ``"auto"``, and raise for a backend that cannot serve the call.

    Raises:
        ValueError: an unknown backend, or one asked for by name that cannot serve the call (the
            message says why).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if is_exporting():  # the others are operators of ours, or cut a call by its lengths
        return "reference"
    if backend != "auto":
        if reason := unsupported_reason(backend, inputs, sequences, options):
            raise ValueError(f"backend {backend!r} cannot serve {reason}; use another backend or 'auto'")
        return backend
    return next(
        name
        for name in _order(inputs, sequences, options)
        if not (inputs.needs_grad and _waits(name, inputs.q1.device, sequences))
        and unsupported_reason(name, inputs, sequences, options) is None
    )


def _waits(backend: str, device: torch.device, sequences: Sequences) -> bool:
    """Whether a backend waits for a GPU: torch's attention reads the documents' bounds. In training
    that would stall every layer.
    """
    return backend == "sdpa" and sequences.is_packed and is_gpu(device)


def is_gpu(device: torch.device) -> bool:
    """Whether "auto" takes what is fast on a GPU."""
    return device.type == "cuda"


def _order(inputs: AttentionInputs, sequences: Sequences, options: AttentionOptions) -> tuple[str, ...]:
    """What "auto" tries: on a GPU what its table (``tuning/``, "attention_backend") found fastest
    for differential attention in 16 bits with such heads; else what is known to be fast for such a
    call.
    """
    q1, packed = inputs.q1, sequences.is_packed
    if not is_gpu(q1.device):
        # Heads that share keys are rows of one product. Where none do, torch's attention is as fast
        # on long sequences.
        alone = q1.shape[-2] == inputs.k1.shape[-2] and q1.shape[-1] == inputs.v.shape[-1]
        long = sequences.max_seqlen_k > MAX_BLOCKED_KEYS and options.left < 0
        return ("sdpa", "cpu", "reference") if alone and long else ("cpu", "sdpa", "reference")
    if q1.dtype not in (torch.float16, torch.bfloat16):
        return ("sdpa", "triton", "reference")
    if packed or options.left >= 0 or options.right > 0:
        order: tuple[str, ...] = ("flash", "triton", "sdpa", "reference")
    else:
        order = ("flash", "sdpa", "triton", "reference")
    if inputs.noise is None:
        return order
    from motif_kernels import machine

    size = tuning.attention_size(q1.shape[-1], inputs.v.shape[-1], q1.element_size())
    measured = machine.measured_backend(size, q1.device)
    return order if measured is None else (measured, *order)


def choose_decoding(backend: str, inputs: AttentionInputs) -> str:
    """What attends to a cache: "triton" and "cpu" read it in place, "packed" copies what rows hold.

    If a backend asked for cannot serve at all, packing tells why. Whether a cache of one head is of
    latents, keys and values in one memory, its readers see (``ops/decoding.py``): it cannot be
    asked of what torch.compile traces.
    """
    q1, k1, k2, v = inputs.q1, inputs.k1, inputs.k2, inputs.v
    heads = v.shape[2]
    of_each_value = inputs.noise_heads or q1.shape[2]
    same_heads = k1.shape[2] == heads and (k2 is None or k2.shape[2] == heads) and of_each_value % heads == 0
    if not same_heads or not (latent.are_few(inputs) or latent.may_be(inputs)):
        return "packed"
    on_gpu = is_gpu(q1.device)
    if backend == "triton" or (backend == "auto" and on_gpu):
        from motif_kernels import machine

        reason = machine.triton_unsupported_reason(q1.device)
        if reason is None and not latent.may_be(inputs):
            reason = fused.unsupported_reason(inputs)
        return "packed" if reason else "triton"
    return "cpu" if backend in ("cpu", "sdpa") or (backend == "auto" and not on_gpu) else "packed"


def as_given(device: torch.device) -> AbstractContextManager[Any]:
    """Within, autocast is off: on every backend attention computes in the dtype of its inputs and
    gives it, the sub-norm included.
    """
    # torch 2.11's compiler cannot ask whether there is an autocast for the device.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    if known and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def attend(
    inputs: AttentionInputs, options: AttentionOptions, documents: Sequences | None = None, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Check a call and serve it.

    Args:
        inputs: a batch or, with documents, packed tensors.
        options: the call's numbers.
        documents: bounds of packed documents.
        backend: one of :data:`BACKENDS`.

    Returns:
        The output and, with return_max_logits, the largest logits of the signal heads (Hs,) and of
        the noise heads (Hn,) where there are any.

    Raises:
        TypeError: dtypes differ, or cu_seqlens is not int32.
        ValueError: shapes, heads or cu_seqlens that do not fit, or a backend that cannot serve.
    """
    check_attention(inputs, packed=documents is not None)
    if documents is None:
        sequences = Sequences(inputs.q1.shape[1], inputs.k1.shape[1])
    else:
        sequences = documents
        check_cu_seqlens(documents, inputs.q1.shape[0], inputs.k1.shape[0], inputs.q1.device)
    name = choose(backend, inputs, sequences, options)
    with as_given(inputs.q1.device):
        out, *max_logits = _BACKENDS[name].run(inputs, sequences, options)
    if not options.return_max_logits:
        return (out,)
    return out, *(max_logits if inputs.noise is not None else max_logits[:1])
