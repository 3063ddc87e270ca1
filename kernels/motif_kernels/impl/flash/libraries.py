"""Which flash-attn is installed, what it can serve on a GPU, and at which widths it is called.

Sources: the libraries' own functions and checks (github.com/Dao-AILab/flash-attention): 2 is
``flash_attn`` (read at 2.8.3), 4 ``flash_attn.cute`` (read at 4.0.0b36). They are found once, at
the first question, and the newest that can serve a call serves it.
"""

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_MODULES = {4: "flash_attn.cute", 2: "flash_attn"}
_NEEDED = {"softmax_scale", "causal", "window_size", "softcap", "deterministic"}
_WIDTHS = (32, 64, 96, 128, 192, 256)


class Library(NamedTuple):
    """A generation's two functions."""

    dense: Callable[..., Tensor | tuple[Tensor, ...]]
    packed: Callable[..., Tensor | tuple[Tensor, ...]]


loaded: dict[int, Library] = {}
"""Those that can be imported by generation, newest first: what :func:`find` found."""


class Request(NamedTuple):
    """What decides whether a library can serve a call, and at which widths.

    ``grouped``: there are fewer key and value heads than query heads. ``backward``: a gradient is
    asked for.
    """

    head_dim: int
    v_head_dim: int
    softcap: float
    deterministic: bool
    grouped: bool
    backward: bool


class ValuePlan(NamedTuple):
    """How one attention is made of calls that a library accepts.

    Queries and keys are padded with zeros to ``head_dim``. Values are cut into pieces of width
    ``piece`` (the last may be narrower), one call each, and each piece is padded with zeros to
    ``v_head_dim``.
    """

    head_dim: int
    piece: int
    v_head_dim: int


def plan_value_width(head_dim: int, v_head_dim: int, supported: Callable[[int, int], int | None]) -> ValuePlan | None:
    """The cheapest way to serve values of any width with a library that accepts only some.

    Every piece repeats Q K^T, and padding adds columns to Q K^T or P V. At equal cost queries stay
    narrow: they need no padded copy, and kernels for narrow heads come closer to the peak. So a
    library that wants Dv = D gets values of 2D in two pieces.

    Args:
        head_dim: D, of queries and keys.
        v_head_dim: Dv, of values.
        supported: for widths (D, Dv) of a call, what it costs: operations for a pair of query and
            key, counted with the columns that the library computes to no end. None for widths that
            it does not accept.

    Returns:
        The plan, or None if no widths that the library accepts would do.
    """
    width = _ceil(head_dim, 8)
    plans: list[tuple[tuple[int, int, int, int], ValuePlan]] = []
    for calls in range(1, _ceil(v_head_dim, 8) // 8 + 1):
        piece = _ceil(-(-v_head_dim // calls), 8)
        if (calls - 1) * piece >= v_head_dim:
            continue  # fewer pieces of this width are enough
        for query_width in {width, *(w for w in _WIDTHS if w > width)}:
            for value_width in {piece, *(w for w in (query_width, *_WIDTHS) if w > piece)}:
                cost = supported(query_width, value_width)
                if cost is not None:
                    rank = (calls * cost, query_width, calls, value_width)
                    plans.append((rank, ValuePlan(query_width, min(piece, v_head_dim), value_width)))
    return min(plans)[1] if plans else None


def _ceil(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _kernel_width(width: int) -> int:
    """The width that flash-attn 2 computes at: the next that a kernel is built for."""
    return next(w for w in _WIDTHS if w >= width)


def _cost_2(request: Request, major: int, head_dim: int, v_head_dim: int) -> int | None:
    if head_dim != v_head_dim or head_dim > 256:
        return None
    width = _kernel_width(head_dim)
    return 4 * width + (10 * width if request.backward else 0)


def _cost_4(request: Request, major: int, head_dim: int, v_head_dim: int) -> int | None:
    """Widths that the library's own tests run, in both directions where both are needed."""
    hopper, blackwell = major == 9, major in (10, 11)
    narrowest, widest = min(head_dim, v_head_dim), max(head_dim, v_head_dim)
    if head_dim == v_head_dim:
        accepted = widest <= (256 if hopper else 128) or (blackwell and widest == 256 and request.softcap == 0)
    elif request.backward:
        # Hopper's backward pass with fewer key heads wants equal widths.
        accepted = (blackwell and (head_dim, v_head_dim) == (192, 128)) or (
            hopper and not request.grouped and 128 < head_dim <= 256 and v_head_dim <= 128
        )
    else:
        accepted = (hopper and widest <= 256) or (blackwell and (widest <= 128 or (head_dim, v_head_dim) == (192, 128)))
    if not accepted or narrowest < 8:
        return None
    forward = 2 * _ceil(head_dim, 16) + 2 * _ceil(v_head_dim, 16)
    return forward + (6 * _ceil(head_dim, 32) + 4 * _ceil(v_head_dim, 32) if request.backward else 0)


_COSTS = {2: _cost_2, 4: _cost_4}


@functools.cache
def find() -> str:
    """Import what is installed into :data:`loaded`; why the others are not among them."""
    missing = []
    for version, name in _MODULES.items():
        try:
            module = importlib.import_module(name)
            library = Library(module.flash_attn_func, module.flash_attn_varlen_func)
        except Exception as error:  # a build for another torch, or a compiler that finds no GPU, can raise anything
            missing.append(f"{name}: {str(error) or type(error).__name__}")
            continue
        lacking = _NEEDED - set(inspect.signature(library.dense).parameters)
        if lacking:
            missing.append(f"{name}: too old, its flash_attn_func has no {', '.join(sorted(lacking))}")
        else:
            loaded[version] = library
    return "; ".join(missing)


def installed() -> int | None:
    """The newest generation of flash-attn that can be imported (4 or 2), or None."""
    find()
    return next(iter(loaded), None)


def capability(device: torch.device) -> tuple[int, int] | None:
    """The GPU's compute capability; None for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def _unsupported_reason(version: int, capability: tuple[int, int], request: Request) -> str | None:
    """Why this generation cannot serve the request, whatever the widths."""
    major, minor = capability
    here = f"flash-attn {version} on compute capability {major}.{minor}"
    if torch.version.hip is not None and version != 2:
        return f"tensors on an AMD GPU: only flash-attn 2 is used there, not {version}"
    if major < 8 or (version == 4 and major > 12):
        return f"this GPU: {here} is not supported"
    if version == 4 and request.backward:
        if major == 8:
            return f"gradients: {here} has no backward pass"
        if major == 12 and request.deterministic:
            return f"deterministic=True: {here} has no deterministic backward pass"
        if major == 12 and request.softcap > 0:
            return f"softcap={request.softcap}: {here} has no backward pass with a soft cap"
    return None


def plan(device: torch.device, request: Request) -> tuple[int, ValuePlan] | str:
    """The newest generation that can serve a request and how it is called, or why none can."""
    gpu = capability(device)
    if gpu is None:
        return f"tensors on {device}: flash-attn runs on GPUs"
    missing = find()
    if not loaded:
        return f"these tensors: no flash-attn is installed ({missing})"
    return _plan_on(gpu, request, tuple(loaded))


@functools.lru_cache(maxsize=256)
def _plan_on(gpu: tuple[int, int], request: Request, versions: tuple[int, ...]) -> tuple[int, ValuePlan] | str:
    reasons = []
    for version in versions:
        reason = _unsupported_reason(version, gpu, request)
        if reason is None:
            supported = functools.partial(_COSTS[version], request, gpu[0])
            found = plan_value_width(request.head_dim, request.v_head_dim, supported)
            if found is not None:
                return version, found
            options = f"deterministic={request.deterministic}, softcap={request.softcap}"
            reason = (
                f"head widths ({request.head_dim}, {request.v_head_dim}) with {options}: flash-attn {version} "
                f"on compute capability {'.'.join(map(str, gpu))} has no kernel for them"
            )
        reasons.append(reason)
    return "; nor ".join(reasons)
