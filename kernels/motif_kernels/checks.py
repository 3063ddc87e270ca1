"""Argument checks: each message names the argument, its value and what is accepted."""

import itertools
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from motif_kernels.types import AttentionInputs, Sequences


def check_devices(**tensors: Tensor | float | None) -> None:
    """Raise ValueError unless all tensors among the values are on one device.

    A kernel reads memory by its address, and a tensor elsewhere has none that it can read: one on
    the meta device beside others is a weight that was not loaded. All on it ask for shapes alone.
    """
    first, device = "", None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {first} on {device}; all must be on one device")


def check_epilogue(
    leading: Sequence[int],
    signal_heads: int,
    noise_heads: int | None,
    v_head_dim: int,
    lam: Tensor | float | None,
    norm_weight: Tensor | None,
    gate: Tensor | None,
) -> None:
    """Raises ValueError unless lambda, sub-norm and gate fit an output."""
    if noise_heads is not None and (noise_heads < 1 or signal_heads % noise_heads):
        raise ValueError(
            f"{signal_heads} signal heads cannot share {noise_heads} noise heads; "
            "the number of signal heads must be a multiple of the number of noise heads"
        )
    # A tuple of shapes, not a set: hashing symbolic sizes would make torch.compile compile for each
    # length.
    if isinstance(lam, Tensor) and tuple(lam.shape) not in ((), (signal_heads,), (*leading, signal_heads)):
        raise ValueError(
            f"lam has shape {tuple(lam.shape)}; it must be a float or have shape (), ({signal_heads},) "
            f"or {(*leading, signal_heads)}"
        )
    if norm_weight is not None and gate is not None:
        raise ValueError("norm_weight and gate were both given; choose the sub-norm or the gate")
    if norm_weight is not None and tuple(norm_weight.shape) != (v_head_dim,):
        raise ValueError(
            f"norm_weight has shape {tuple(norm_weight.shape)}; it must be ({v_head_dim},), the width of a value head"
        )
    if gate is not None and tuple(gate.shape) != (*leading, signal_heads, v_head_dim):
        raise ValueError(
            f"gate has shape {tuple(gate.shape)}; it must have the output's shape "
            f"{(*leading, signal_heads, v_head_dim)}"
        )


def check_attention(inputs: AttentionInputs, *, packed: bool, paged: bool = False) -> None:
    """Raise unless the tensors are (B, S, heads, width), or (total, heads, width) when packed, and
    fit together.

    Paged keys and values are (blocks, block size, heads, width).
    """
    q1, k1, q2, k2, v, lam = inputs[:6]
    given = [name for name, t in (("q2", q2), ("k2", k2), ("lam", lam)) if t is not None]
    if len(given) not in (0, 3):
        missing = ", ".join(name for name in ("q2", "k2", "lam") if name not in given)
        raise ValueError(
            f"{', '.join(given)} given without {missing}: differential attention takes q2, k2 and lam together, "
            "softmax attention none of them"
        )
    q, k = ("q1", "k1") if q2 is not None else ("q", "k")  # as the public functions call them
    named = ((q, q1), (k, k1), ("q2", q2), ("k2", k2), ("v", v))
    present = {name: t for name, t in named if t is not None}
    layout = "(total, heads, headdim)" if packed else "(batch, seqlen, heads, headdim)"
    dtype, head_dim = q1.dtype, q1.shape[-1]
    check_devices(**present, lam=lam, norm_weight=inputs.norm_weight, gate=inputs.gate)
    for name, tensor in present.items():
        if tensor.ndim != (3 if packed else 4):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {layout}")
        if tensor.dtype != dtype or not dtype.is_floating_point:
            raise TypeError(f"{name} is {tensor.dtype} and {q} is {q1.dtype}; all must be one floating-point dtype")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} has stride {tensor.stride(-1)} in its last dimension, head_dim; "
                f"it must be contiguous there (stride 1): call {name}.contiguous()"
            )
        if tensor.shape[-1] != head_dim and name != "v":
            raise ValueError(f"{name} has head_dim {tensor.shape[-1]} and {q} has {q1.shape[-1]}; they must be equal")
    if q2 is not None and q1.shape[:-2] != q2.shape[:-2]:
        raise ValueError(f"q1 is {tuple(q1.shape)} and q2 {tuple(q2.shape)}; they must differ only in heads")
    for name in ("k2", "v"):
        if name in present and present[name].shape[:-2] != k1.shape[:-2]:
            raise ValueError(
                f"{name} is {tuple(present[name].shape)} and {k} {tuple(k1.shape)}; "
                "they must differ only in heads and width"
            )
    if not (packed or paged) and k1.shape[0] != q1.shape[0]:
        raise ValueError(f"{k} has batch size {k1.shape[0]} and {q} has {q1.shape[0]}; they must be equal")
    for name, of in (("q2", q), (k, q), ("k2", "q2"), ("v", q if q2 is None else "q2")):
        if name not in present:
            continue
        heads, whole = present[name].shape[-2], present[of].shape[-2]
        if heads < 1 or whole % heads:
            raise ValueError(f"{of} has {whole} heads and {name} has {heads}; {of}'s must be a multiple of {name}'s")
    check_epilogue(
        q1.shape[:-2], q1.shape[-2], inputs.noise_heads or None, v.shape[-1], lam, inputs.norm_weight, inputs.gate
    )


def may_read(values: Tensor) -> bool:
    """Whether values may be read: not where that would stall a GPU, nor while tracing."""
    if torch.compiler.is_compiling() or isinstance(values, FakeTensor):
        return False
    return values.device.type == "cpu" or os.environ.get("MOTIF_CHECK") == "1"


def check_offsets(function: str, offsets: Tensor, experts: int, rows: int) -> None:
    """Raise unless offsets is (experts,) int32 and, where it may be read, never falls and ends
    within the rows.
    """
    if offsets.dtype != torch.int32:
        raise TypeError(f"{function}: offsets is {offsets.dtype}; it must be int32")
    if experts < 1 or tuple(offsets.shape) != (experts,):
        raise ValueError(
            f"{function}: offsets has shape {tuple(offsets.shape)}; it must be ({experts},), where the rows of each of "
            f"the {experts} experts end"
        )
    if not may_read(offsets):
        return
    ends = [0, *offsets.tolist()]
    if any(end < start for start, end in itertools.pairwise(ends)) or ends[-1] > rows:
        raise ValueError(
            f"{function}: offsets is {ends[1:]}; it must be of 0 or more, never fall and end within the {rows} rows"
        )


def check_cu_seqlens(documents: Sequences, total_q: int, total_k: int, device: torch.device) -> None:
    """Raise unless each cu_seqlens is int32, starts at 0, never falls, ends within the total and
    has no document over max_seqlen, and both name equally many documents.

    Values are read on the CPU; on a GPU, where reading them would stall the stream, only with
    ``MOTIF_CHECK=1``; never while torch.compile traces, for a traced program has no values to read.
    """
    max_seqlen_q, max_seqlen_k, cu_seqlens_q, cu_seqlens_k = documents
    assert cu_seqlens_q is not None
    assert cu_seqlens_k is not None
    _check_bounds("cu_seqlens_q", cu_seqlens_q, total_q, max_seqlen_q, device)
    _check_bounds("cu_seqlens_k", cu_seqlens_k, total_k, max_seqlen_k, device)
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"cu_seqlens_q names {len(cu_seqlens_q) - 1} documents and cu_seqlens_k "
            f"{len(cu_seqlens_k) - 1}; they must be equal"
        )


def _check_bounds(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int, device: torch.device) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise TypeError(
            f"{name} is {cu_seqlens.dtype} with shape {tuple(cu_seqlens.shape)}; "
            "it must be an int32 vector of documents + 1"
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"{name} is on {cu_seqlens.device} and the packed tensors on {device}; all must be on one device"
        )
    if not may_read(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"{name} starts at {bounds[0]}; it must start at 0")
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    if any(length < 0 for length in lengths):
        raise ValueError(
            f"{name} falls after entry {next(i for i, n in enumerate(lengths) if n < 0)}; it must never fall"
        )
    if bounds[-1] > total:
        raise ValueError(f"{name} ends at {bounds[-1]} but the packed tensors hold {total} tokens; it must end within")
    if lengths and max(lengths) > max_seqlen:
        raise ValueError(f"{name} has a document of {max(lengths)} tokens but the stated maximum is {max_seqlen}")
