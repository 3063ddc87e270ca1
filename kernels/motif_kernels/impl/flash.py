"""Softmax attention through flash-attn 4, 3 or 2, whichever is installed.

Differential attention takes two calls of :func:`attention`, one for all signal heads and one for
the noise heads, which are never repeated, and :func:`motif_kernels.diff_combine`. Sources: the
libraries' own functions and checks (github.com/Dao-AILab/flash-attention): 2 is ``flash_attn``
(read at 2.8.3), 3 ``flash_attn_interface`` (read as of 2.8.3), 4 ``flash_attn.cute``
(read at 4.0.0b36).

They are found once, at the first question, and the newest that can serve a call serves it. What
they lack is made up for here:

- **Value width.** 2 wants values as wide as keys, 3 and 4 allow a few pairs of widths. Values are
  cut into pieces, one call each, which repeats Q K^T, or padded with zeros:
  :func:`plan_value_width` takes what costs the library least.
- **Key and value heads** must be equally many. The fewer are repeated up to the least common
  multiple, no further: a single head as a view (a copy for 3, whose TMA loads are not known to take
  a stride of 0), more as a copy.
- **Windows.** 2 takes a side of at least the key length for unbounded and an unbounded side for the
  key length, both right only while there are no more queries than keys. Where there are more it is
  called with packed sequences and a key length that makes it right.
- **Empty tensors** are answered here: they would launch nothing, or fail.

A row that sees nothing is 0 in each of them and passes no gradient: 2 stores a log-sum-exp of +inf
for such a row, 3 and 4 -inf, replaced by 0 in the backward pass, so that its probabilities are
exp(-inf) = 0 there.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from motif_kernels.tracing import constant

_MODULES = {4: "flash_attn.cute", 3: "flash_attn_interface", 2: "flash_attn"}
_NEEDED = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
_WIDTHS = (32, 64, 96, 128, 192, 256)


class _Library(NamedTuple):
    dense: Callable[..., Any]
    packed: Callable[..., Any]


class _Request(NamedTuple):
    """What decides whether a library can serve a call, and at which widths.

    ``grouped``: there are fewer key and value heads than query heads. ``backward``: a gradient is
    asked for.
    """

    capability: tuple[int, int]
    head_dim: int
    value_dim: int
    softcap: float
    deterministic: bool
    grouped: bool
    backward: bool


class _Packing(NamedTuple):
    """Where packed documents begin and end, in the libraries' words."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int


class ValuePlan(NamedTuple):
    """How one attention is made of calls that a library accepts.

    Queries and keys are padded with zeros to ``head_dim``. Values are cut into pieces of width
    ``piece`` (the last may be narrower), one call each, and each piece is padded with zeros to
    ``value_dim``.
    """

    head_dim: int
    piece: int
    value_dim: int


def plan_value_width(head_dim: int, value_dim: int, supported: Callable[[int, int], int | None]) -> ValuePlan | None:
    """The cheapest way to serve values of any width with a library that accepts only some.

    Every piece repeats Q K^T, and padding adds columns to Q K^T or P V. At equal cost queries stay
    narrow: they need no padded copy, and kernels for narrow heads come closer to the peak. So a
    library that wants Dv = D gets values of 2D in two pieces.

    Args:
        head_dim: d, the width of queries and keys.
        value_dim: dv, the width of values.
        supported: for widths (D, Dv) of a call, what it costs: operations for a pair of query and
            key, counted with the columns that the library computes to no end. None for widths that
            it refuses.

    Returns:
        The plan, or None if no widths that the library accepts would do.
    """
    width = _ceil(head_dim, 8)
    plans: list[tuple[tuple[int, int, int, int], ValuePlan]] = []
    for calls in range(1, _ceil(value_dim, 8) // 8 + 1):
        piece = _ceil(-(-value_dim // calls), 8)
        if (calls - 1) * piece >= value_dim:
            continue  # fewer pieces of this width are enough
        for query_width in {width, *(w for w in _WIDTHS if w > width)}:
            for value_width in {piece, *(w for w in (query_width, *_WIDTHS) if w > piece)}:
                cost = supported(query_width, value_width)
                if cost is not None:
                    rank = (calls * cost, query_width, calls, value_width)
                    plans.append((rank, ValuePlan(query_width, min(piece, value_dim), value_width)))
    return min(plans)[1] if plans else None


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _kernel_width(width: int, smallest: int = 32) -> int:
    """The width that flash-attn 2 and 3 compute at: the next that a kernel is built for."""
    return next(w for w in _WIDTHS if w >= max(width, smallest))


def _cost_2(request: _Request, head_dim: int, value_dim: int) -> int | None:
    if head_dim != value_dim or head_dim > 256:
        return None
    width = _kernel_width(head_dim)
    return 4 * width + (10 * width if request.backward else 0)


def _cost_3(request: _Request, head_dim: int, value_dim: int) -> int | None:
    if head_dim > 256:
        return None
    wide_values = head_dim <= 64 and value_dim <= 512
    narrow_values = 128 < head_dim <= 192 and 96 < value_dim <= 128
    if head_dim != value_dim and not (request.capability[0] == 9 and (wide_values or narrow_values)):
        return None
    width = value_width = _kernel_width(head_dim, 64)
    if head_dim <= 64 < value_dim:
        value_width = 256 if value_dim <= 256 else 512
    elif head_dim > 128 >= value_dim:
        value_width = 128
    forward = 2 * width + 2 * value_width
    if not request.backward:
        return forward
    if value_dim > 256:
        return None
    # The backward pass has one width for both sides, and at 256 no deterministic form.
    both = _kernel_width(max(head_dim, value_dim), 64)
    return None if request.deterministic and both == 256 else forward + 10 * both


def _cost_4(request: _Request, head_dim: int, value_dim: int) -> int | None:
    """Widths that the library's own tests run, in both directions where both are needed."""
    hopper, blackwell = request.capability[0] == 9, request.capability[0] in (10, 11)
    narrowest, widest = min(head_dim, value_dim), max(head_dim, value_dim)
    if head_dim == value_dim:
        accepted = widest <= (256 if hopper else 128) or (blackwell and widest == 256 and request.softcap == 0)
    elif request.backward:
        # Hopper's backward pass with fewer key heads wants equal widths.
        accepted = (blackwell and (head_dim, value_dim) == (192, 128)) or (
            hopper and not request.grouped and 128 < head_dim <= 256 and value_dim <= 128
        )
    else:
        accepted = (hopper and widest <= 256) or (blackwell and (widest <= 128 or (head_dim, value_dim) == (192, 128)))
    if not accepted or narrowest < 8:
        return None
    forward = 2 * _ceil(head_dim, 16) + 2 * _ceil(value_dim, 16)
    return forward + (6 * _ceil(head_dim, 32) + 4 * _ceil(value_dim, 32) if request.backward else 0)


_COSTS = {2: _cost_2, 3: _cost_3, 4: _cost_4}


_libraries: dict[int, _Library] = {}


@functools.cache
def _find() -> str:
    """Fill ``_libraries`` with those that are installed, newest first; why the others are not among
    them.
    """
    missing = []
    for version, name in _MODULES.items():
        try:
            module = importlib.import_module(name)
            library = _Library(module.flash_attn_func, module.flash_attn_varlen_func)
        except Exception as error:  # a build for another torch, or a compiler that finds no GPU, can raise anything
            missing.append(f"{name}: {str(error) or type(error).__name__}")
            continue
        lacking = _NEEDED - set(inspect.signature(library.dense).parameters)
        if lacking:
            missing.append(f"{name}: too old, its flash_attn_func has no {', '.join(sorted(lacking))}")
        else:
            _libraries[version] = library
    return "; ".join(missing)


def installed() -> int | None:
    """The newest generation of flash-attn that can be imported (4, 3 or 2), or None. Looked up
    once.
    """
    _find()
    return next(iter(_libraries), None)


def _capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _version_unsupported_reason(version: int, request: _Request) -> str | None:
    """Why this generation cannot serve the request, whatever the widths."""
    major, minor = request.capability
    here = f"flash-attn {version} on compute capability {major}.{minor}"
    if torch.version.hip is not None and version != 2:
        return f"tensors on an AMD GPU: only flash-attn 2 is used there, not {version}"
    if major < 8 or (version == 3 and major > 9) or (version == 4 and major > 12):
        return f"this GPU: {here} is not supported"
    if version == 4 and request.backward:
        if major == 8:
            return f"gradients: {here} has no backward pass"
        if major == 12 and request.deterministic:
            return f"deterministic=True: {here} has no deterministic backward pass"
        if major == 12 and request.softcap > 0:
            return f"softcap={request.softcap}: {here} has no backward pass with a soft cap"
    return None


@functools.lru_cache(maxsize=256)
def _plan(request: _Request) -> tuple[int, ValuePlan] | str:
    """The newest generation that can serve the request and the widths to call it at, or why none
    can.
    """
    missing = _find()
    if not _libraries:
        return f"these tensors: no flash-attn is installed ({missing})"
    reasons = []
    for version in _libraries:
        unsupported_reason = _version_unsupported_reason(version, request)
        if unsupported_reason is None:
            supported = functools.partial(_COSTS[version], request)
            plan = plan_value_width(request.head_dim, request.value_dim, supported)
            if plan is not None:
                return version, plan
            options = f"deterministic={request.deterministic}, softcap={request.softcap}"
            unsupported_reason = (
                f"head widths ({request.head_dim}, {request.value_dim}) with {options}: flash-attn {version} "
                f"on compute capability {'.'.join(map(str, request.capability))} has no kernel for them"
            )
        reasons.append(unsupported_reason)
    return "; nor ".join(reasons)


@constant  # a search for libraries cannot be traced; its result, plain numbers, can
def _choose(device: torch.device, *request: Any) -> tuple[int, ...] | str:
    """:func:`_plan` as (generation, *widths), or why there is none."""
    capability = _capability(device)
    if capability is None:
        return f"tensors on {device}: flash-attn runs on GPUs"
    plan = _plan(_Request(capability, *request))
    return plan if isinstance(plan, str) else (plan[0], *plan[1])


def unsupported_reason(
    *,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float = 0.0,
    return_max_logits: bool = False,
    deterministic: bool = True,
    needs_grad: bool = True,
) -> str | None:
    """Why no installed flash-attn can serve these arguments, in words that follow "cannot serve";
    None if one can.

    Windows and causal masks are served by every generation.

    Args:
        device: where the tensors are.
        dtype: of queries, keys and values.
        head_dim: d, the width of queries and keys.
        value_dim: dv, the width of values.
        softcap: soft cap of the logits.
        return_max_logits: whether the largest logits are asked for.
        deterministic: whether the backward pass must not depend on scheduling.
        needs_grad: whether there will be a backward pass.
    """
    if return_max_logits:
        return "return_max_logits=True: flash-attn does not give its logits"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: flash-attn takes float16 and bfloat16"
    # Heads do not decide it: where they matter, padding to equal widths helps.
    choice = _choose(device, head_dim, value_dim, softcap, deterministic, True, needs_grad)
    return choice if isinstance(choice, str) else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = True,
) -> Tensor:
    """Softmax attention by flash-attn.

    Args:
        q: (B, Sq, H, D) in float16 or bfloat16, on a GPU.
        k: (B, Sk, Hk, D), H a multiple of Hk.
        v: (B, Sk, Hv, Dv), H a multiple of Hv.
        scale: multiplies the logits.
        causal: hide later keys, aligned to the bottom right.
        window_size: inclusive (left, right), -1 for unbounded.
        softcap: if positive, logits become ``softcap * tanh(logits / softcap)``.
        deterministic: ask for the backward pass whose result does not depend on scheduling.

    Returns:
        Tensor (B, Sq, H, Dv) of q's dtype; a row that sees nothing is 0.

    Raises:
        ValueError: no installed flash-attn can serve the arguments (:func:`unsupported_reason` says
            so beforehand).
    """
    return _attend(q, k, v, None, scale, causal, window_size, softcap, deterministic)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    scale: float,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = True,
) -> Tensor:
    """:func:`attention` over packed documents, which never attend to each other.

    Args:
        q: (total_q, H, D).
        k: (total_k, Hk, D).
        v: (total_k, Hv, Dv).
        cu_seqlens_q: (documents + 1,) int32 bounds of the documents in total_q, on q's device.
        cu_seqlens_k: the same in total_k.
        max_seqlen_q: the longest document's queries (or more).
        max_seqlen_k: the longest document's keys (or more).
        scale: multiplies the logits.
        causal: bottom-right aligned within each document.
        window_size: inclusive (left, right) within each document, -1 for unbounded.
        softcap: soft cap of the logits.
        deterministic: ask for a deterministic backward pass.

    Returns:
        Tensor (total_q, H, Dv) of q's dtype; a row that sees nothing is 0.

    Raises:
        ValueError: no installed flash-attn can serve the arguments.
    """
    packing = _Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attend(q, k, v, packing, scale, causal, window_size, softcap, deterministic)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: _Packing | None,
    scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    deterministic: bool,
) -> Tensor:
    if not (q.numel() and k.numel() and v.numel()):
        # The empty sums keep the inputs in the graph, with gradients of 0.
        zero = sum(t.flatten()[:0].sum() for t in (q, k, v))
        return q.new_zeros(*q.shape[:-1], v.shape[-1]) + zero
    value_dim = v.shape[-1]
    heads = math.lcm(k.shape[-2], v.shape[-2])
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    grouped = heads != q.shape[-2]
    choice = _choose(q.device, q.shape[-1], value_dim, softcap, deterministic, grouped, backward)
    if isinstance(choice, str):
        raise ValueError(f"backend 'flash' cannot serve {choice}")
    version, *widths = choice
    plan = ValuePlan(*widths)
    k, v = _repeat_heads(k, heads, version), _repeat_heads(v, heads, version)
    q, k = _pad(q, plan.head_dim), _pad(k, plan.head_dim)
    outputs = []
    # split, not slices: its backward pass joins the pieces' gradients in one step.
    for piece in v.split(plan.piece, dim=-1):
        out = _call(
            version,
            q,
            k,
            _pad(piece, plan.value_dim),
            packing,
            window_size,
            softmax_scale=scale,
            causal=causal,
            softcap=softcap,
            deterministic=deterministic,
        )
        outputs.append(out[..., : piece.shape[-1]])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


def _pad(t: Tensor, width: int) -> Tensor:
    return t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1]))


def _repeat_heads(t: Tensor, heads: int, version: int) -> Tensor:
    """Each head (..., H, D) repeated in place, to ``heads``; a view if there is one head, save for
    flash-attn 3.
    """
    if t.shape[-2] == heads:
        return t
    repeats = heads // t.shape[-2]
    repeated = t.unsqueeze(-2).expand(*t.shape[:-1], repeats, t.shape[-1]).flatten(-3, -2)
    return repeated.contiguous() if version == 3 else repeated


def _even_bounds(t: Tensor) -> Tensor:
    """Bounds of a batch (B, S, heads, width) seen as packed sequences."""
    batch, seqlen = t.shape[:2]
    return torch.arange(0, (batch + 1) * seqlen, seqlen, dtype=torch.int32, device=t.device)


def _call(
    version: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: _Packing | None,
    window_size: tuple[int, int],
    *,
    causal: bool,
    **options: Any,
) -> Tensor:
    left, right = (max(side, -1) for side in window_size)
    if causal:
        right = 0
    shape = q.shape
    if version == 2 and right != 0 and (left, right) != (-1, -1):
        if packing is not None:
            packing = packing._replace(max_seqlen_k=max(packing.max_seqlen_q, packing.max_seqlen_k))
        elif q.shape[1] > k.shape[1]:
            packing = _Packing(_even_bounds(q), _even_bounds(k), q.shape[1], q.shape[1])
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    unbounded = None if version == 4 else -1
    options |= {
        "causal": causal,
        "window_size": tuple(unbounded if side < 0 else side for side in (left, -1 if causal else right)),
    }
    library = _libraries[version]
    if packing is None:
        result = library.dense(q, k, v, **options)
    else:
        result = library.packed(q, k, v, **packing._asdict(), **options)
    out = result[0] if isinstance(result, tuple) else result  # some generations give the log-sum-exp too
    return out.view(*shape[:-1], out.shape[-1])
