"""The backends of differential attention: which of them can serve a call, which is taken, and how
each is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from motif_kernels import reference, tuning
from motif_kernels.combine import diff_combine
from motif_kernels.impl import flash, sdpa
from motif_kernels.ops import diff_attention as operator
from motif_kernels.ops import triton_is_installed
from motif_kernels.tracing import constant

Result = tuple[Tensor, Tensor | None, Tensor | None]
"""The output, and where asked for the largest signal and noise logits."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """The checked arguments of :func:`motif_kernels.diff_attn_func`, or of its packed form if
    cu_seqlens are given.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    v: Tensor
    lam: Tensor | float
    softmax_scale: float
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    norm_weight: Tensor | None
    norm_eps: float
    out_scale: float
    gate: Tensor | None
    deterministic: bool
    return_max_logits: bool
    max_seqlen_q: int
    max_seqlen_k: int
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None

    def needs_grad(self) -> bool:
        """Whether a backward pass may follow."""
        tensors = (self.q1, self.k1, self.q2, self.k2, self.v, self.lam, self.norm_weight, self.gate)
        return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


# Why a backend cannot serve a call, in words that go on from "backend '...' cannot serve ", or
# None.


def _reference_unsupported_reason(call: Call) -> str | None:
    return None


def _sdpa_unsupported_reason(call: Call) -> str | None:
    if call.softcap > 0:
        return f"softcap={call.softcap}: torch's scaled_dot_product_attention has no soft cap"
    if call.return_max_logits:
        return "return_max_logits=True: torch's scaled_dot_product_attention does not give its logits"
    return None


def _flash_unsupported_reason(call: Call) -> str | None:
    return flash.unsupported_reason(
        device=call.q1.device,
        dtype=call.q1.dtype,
        head_dim=call.q1.shape[-1],
        value_dim=call.v.shape[-1],
        softcap=call.softcap,
        return_max_logits=call.return_max_logits,
        deterministic=call.deterministic,
        needs_grad=call.needs_grad(),
    )


_LAUNCH_TABLES_FIT = ((9, 0), (10, 0), (10, 3))


@constant
def triton_unsupported_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if not triton_is_installed():
        return f"tensors on {device}: triton is not installed"
    import triton

    if device.type == "cpu" and triton.knobs.runtime.interpret:
        return None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability in _LAUNCH_TABLES_FIT or tuning.has_table(device, "attention_forward"):
            return None
        return (
            f"compute capability {'.'.join(map(str, capability))}: there are launch tables for Hopper and data-centre "
            "Blackwell, whose tiles may not fit here; benchmarks.tuning.tune writes a table for another GPU"
        )
    return f"tensors on {device}: Triton kernels need a CUDA GPU (or, to try them out, TRITON_INTERPRET=1)"


def _triton_unsupported_reason(call: Call) -> str | None:
    return triton_unsupported_reason(call.q1.device) or operator.unsupported_reason(
        call.q1, call.k1, call.q2, call.k2, call.v, call.gate, call.cu_seqlens_q
    )


def _run_reference(call: Call) -> Result:
    packed = call.cu_seqlens_q is not None
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        visible = reference.packed_attention_mask(
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.q1.shape[0],
            call.k1.shape[0],
            causal=call.causal,
            window_size=call.window_size,
        )
    else:
        visible = reference.attention_mask(
            call.q1.shape[1],
            call.k1.shape[1],
            causal=call.causal,
            window_size=call.window_size,
            device=call.q1.device,
        )

    def batched(x: Tensor) -> Tensor:
        return x[None] if packed else x

    lam = call.lam
    if isinstance(lam, Tensor) and lam.ndim == 2:
        lam = lam[None]
    out, max_signal, max_noise = reference.diff_attention(
        batched(call.q1),
        batched(call.k1),
        batched(call.q2),
        batched(call.k2),
        batched(call.v),
        lam,
        mask=visible,
        softmax_scale=call.softmax_scale,
        softcap=call.softcap,
        norm_weight=call.norm_weight,
        norm_eps=call.norm_eps,
        out_scale=call.out_scale,
        gate=None if call.gate is None else batched(call.gate),
    )
    return out[0] if packed else out, max_signal.float(), max_noise.float()


def _combine(call: Call, o_signal: Tensor, o_noise: Tensor) -> Result:
    out = diff_combine(
        o_signal,
        o_noise,
        call.lam,
        norm_weight=call.norm_weight,
        norm_eps=call.norm_eps,
        out_scale=call.out_scale,
        gate=call.gate,
    )
    return out, None, None


def _run_sdpa(call: Call) -> Result:
    packed = call.cu_seqlens_q is not None

    def attend(q: Tensor, k: Tensor) -> Tensor:
        out = sdpa.attention(
            *((q[None], k[None], call.v[None]) if packed else (q, k, call.v)),
            scale=call.softmax_scale,
            causal=call.causal,
            window_size=call.window_size,
            cu_seqlens_q=call.cu_seqlens_q,
            cu_seqlens_k=call.cu_seqlens_k,
        )
        return out[0] if packed else out

    return _combine(call, attend(call.q1, call.k1), attend(call.q2, call.k2))


def _run_flash(call: Call) -> Result:
    def attend(q: Tensor, k: Tensor) -> Tensor:
        if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
            return flash.attention(
                q,
                k,
                call.v,
                scale=call.softmax_scale,
                causal=call.causal,
                window_size=call.window_size,
                softcap=call.softcap,
                deterministic=call.deterministic,
            )
        return flash.varlen_attention(
            q,
            k,
            call.v,
            call.cu_seqlens_q,
            call.cu_seqlens_k,
            call.max_seqlen_q,
            call.max_seqlen_k,
            scale=call.softmax_scale,
            causal=call.causal,
            window_size=call.window_size,
            softcap=call.softcap,
            deterministic=call.deterministic,
        )

    return _combine(call, attend(call.q1, call.k1), attend(call.q2, call.k2))


def kernel_window(causal: bool, window_size: tuple[int, int]) -> tuple[int, int]:
    """The window that the kernels take: causal is a right side of 0, and no side is too long for 32
    bits.
    """
    far = 1 << 30  # further than any key; added to a position, 32 bits still hold it
    left, right = window_size
    return min(left, far), 0 if causal else min(right, far)


def _run_triton(call: Call) -> Result:
    lam = call.lam
    if not isinstance(lam, Tensor):
        lam = torch.full((), lam, dtype=torch.float32, device=call.q1.device)
    results = operator.diff_attention(
        call.q1,
        call.k1,
        call.q2,
        call.k2,
        call.v,
        lam,
        call.norm_weight,
        call.gate,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        call.max_seqlen_q,
        call.max_seqlen_k,
        call.softmax_scale,
        *kernel_window(call.causal, call.window_size),
        call.softcap,
        call.norm_eps,
        call.out_scale,
        call.deterministic,
        call.needs_grad(),
        call.return_max_logits,
    )
    return results[0], results[6], results[7]


@dataclass(frozen=True)
class _Backend:
    unsupported_reason: Callable[[Call], str | None]
    run: Callable[[Call], Result]


_BACKENDS = {
    "reference": _Backend(_reference_unsupported_reason, _run_reference),
    "sdpa": _Backend(_sdpa_unsupported_reason, _run_sdpa),
    "flash": _Backend(_flash_unsupported_reason, _run_flash),
    "triton": _Backend(_triton_unsupported_reason, _run_triton),
}
BACKENDS = ("auto", *_BACKENDS)


def choose(backend: str, call: Call) -> str:
    """Resolve ``"auto"`` and refuse a backend that cannot serve the call.

    On a GPU "auto" takes what the GPU's table (``tuning/``, "attention_backend") says is fastest
    for the head widths, or without one the kernels written here; then what else can serve, composed
    attention before the plain formula. On a CPU it takes torch's attention, or the plain formula.

    Raises:
        ValueError: an unknown backend, or one asked for by name that cannot serve the call
            (the message says why).
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not one of {', '.join(map(repr, BACKENDS))}")
    if backend != "auto":
        if unsupported_reason := _BACKENDS[backend].unsupported_reason(call):
            raise ValueError(f"backend {backend!r} cannot serve {unsupported_reason}; use another backend or 'auto'")
        return backend
    order = ("sdpa", "reference")
    if call.q1.device.type == "cuda":
        size = tuning.attention_size(call.q1.shape[-1], call.v.shape[-1], call.q1.element_size())
        measured = tuning.find_choice("attention_backend", size, call.q1.device)
        order = (*([measured["backend"]] if measured else []), "triton", "flash", *order)
    return next(name for name in order if _BACKENDS[name].unsupported_reason(call) is None)


def run(backend: str, call: Call) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Serve a call: the output, or with return_max_logits the output and the largest signal and
    noise logits.
    """
    out, max_signal, max_noise = _BACKENDS[choose(backend, call)].run(call)
    if not call.return_max_logits:
        return out
    assert max_signal is not None
    assert max_noise is not None
    return out, max_signal, max_noise
