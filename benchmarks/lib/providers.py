"""The attentions that users could pick, as functions of q, k and v, and compositions."""

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib.bench import DTYPES
from benchmarks.lib.shapes import DIRECTIONS, AttentionCase, epilogue
from motif_kernels import diff_combine

Function = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name -> the output."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention of q, k and v, (batch, rows, heads, width); packed without batch."""

_FLASH_ATTN = {"flash-attn 4": "flash_attn.cute", "flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}


@dataclass(frozen=True)
class Provider:
    """A way to compute what a case asks for, by one library's kernel."""

    name: str
    forms: Sequence[tuple[str, Function]]
    """What to try, in order, with a name for each; the first that runs is taken."""
    variant: str = ""
    """The kernel, where there are several."""
    directions: tuple[str, ...] = DIRECTIONS
    in_place: bool = False
    """It writes its result over the incoming gradient."""

    def label(self) -> dict[str, str]:
        """What its results are filed under, beside the form."""
        return {"provider": self.name, "variant": self.variant}


@functools.cache
def flash_attn_modules() -> tuple[dict[str, Any], dict[str, str]]:
    """The generations of flash-attn that can be imported, and why each other one cannot."""
    found: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, module in _FLASH_ATTN.items():
        try:
            found[name] = importlib.import_module(module)
        except Exception as error:  # a build for another torch, or a compiler that finds no GPU, can raise anything
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return found, missing


def libraries(case: AttentionCase, device: torch.device) -> dict[str, Attend]:
    """The softmax attentions for a case's mask, by their kernels' names, without flex."""
    masked = bool(case.documents or case.layout.window)
    if device.type != "cuda":
        one = sdpa(case, device, SDPBackend.FLASH_ATTENTION)
        return {"flash": by_document(case, one) if case.documents else one}
    found = {name: flash_attn(case, device, module) for name, module in flash_attn_modules()[0].items()}
    if masked:
        # scaled_dot_product_attention has no windows and no documents; its flash kernel has them
        # here.
        return {"flash": varlen(case, device), **found}
    kernels = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {**{name: sdpa(case, device, kernel) for name, kernel in kernels.items()}, **found}


def sdpa(
    case: AttentionCase, device: torch.device, kernel: SDPBackend | None, dtype: torch.dtype | None = None
) -> Attend:
    """SDPA by one of torch's kernels; a window is a mask, made here."""
    mask = None
    if case.layout.window and not case.documents:
        row = torch.arange(case.rows, device=device)
        distance = row[:, None] - row
        hidden = (distance < 0) | (distance >= case.layout.window)
        mask = torch.zeros(hidden.shape, dtype=dtype or DTYPES[case.dtype], device=device).masked_fill_(
            hidden, -torch.inf
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A kernel that is not to be had warns of every reason why.
        chosen = contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)
        with chosen, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(
                q.transpose(-3, -2),
                k.transpose(-3, -2),
                v.transpose(-3, -2),
                attn_mask=mask,
                is_causal=mask is None and q.shape[-3] > 1,
                scale=case.scale,
                enable_gqa=q.shape[-2] != k.shape[-2],
            )
        return out.transpose(-3, -2)

    return attend


def by_document(case: AttentionCase, attend: Attend) -> Attend:
    """A call for each packed document."""

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(case.documents) for t in (q, k, v)), strict=True)
        return torch.cat([attend(*(t[None] for t in part))[0] for part in parts])

    return each


def varlen(case: AttentionCase, device: torch.device) -> Attend:
    """The flash attention of torch for packed documents, which has windows too."""
    bounds = torch.tensor(case.bounds, dtype=torch.int32, device=device)
    longest = max(case.documents, default=case.length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention import varlen as library

        varlen_attn: Callable[..., Any] = library.varlen_attn
        packed = [t.flatten(0, -3) for t in (q, k, v)]
        # Not every torch has enable_gqa; those without it take grouped queries as they come.
        options = known_options(varlen_attn, enable_gqa=q.shape[-2] != k.shape[-2])
        out = varlen_attn(
            *packed, bounds, bounds, longest, longest, scale=case.scale, window_size=case.window_size, **options
        )
        return first_of(out).view(*q.shape[:-1], v.shape[-1])

    return attend


def flash_attn(case: AttentionCase, device: torch.device, module: Any) -> Attend:
    """The attention of one generation of flash-attn."""
    options: dict[str, Any] = {"softmax_scale": case.scale, "causal": True}
    if case.layout.window:
        options["window_size"] = case.window_size
    if not case.documents:
        return lambda q, k, v: first_of(module.flash_attn_func(q, k, v, **options))
    bounds = torch.tensor(case.bounds, dtype=torch.int32, device=device)
    names = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": case.length, "max_seqlen_k": case.length}
    options |= known_options(module.flash_attn_varlen_func, **names)
    return lambda q, k, v: first_of(module.flash_attn_varlen_func(q, k, v, **options))


def flex(case: AttentionCase, device: torch.device, compile_: Callable[..., Any] = torch.compile) -> Attend:
    """FlexAttention through ``compile_``; its block mask is made here. A single query sees all."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, document = case.layout.window or case.rows, case.document_starts().to(device)

    def causal(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def limited(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window) & (document[query] == document[key])

    mask = None
    if case.queries > 1:
        visible = limited if case.documents or case.layout.window else causal
        mask = create_block_mask(visible, None, None, case.rows, case.rows, device=str(device))
    compiled = compile_(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [(t[None] if case.documents else t).transpose(1, 2) for t in (q, k, v)]
        gqa = q.shape[-2] != k.shape[-2]
        out: Tensor = compiled(*tensors, block_mask=mask, scale=case.scale, enable_gqa=gqa).transpose(1, 2)
        return out[0] if case.documents else out

    return attend


def compose(attend: Attend, calls: int, combine: Callable[..., Tensor] = diff_combine) -> Function:
    """What a case asks for from softmax attention.

    Args:
        attend: softmax attention.
        calls: 1 for a case without noise; 2 for the difference; 4 for it with each call on half of
            the values' width.
        combine: what joins signal and noise.
    """

    def once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if calls < 4:
            return attend(q, k, v)
        return torch.cat([attend(q, k, half) for half in v.chunk(2, dim=-1)], dim=-1)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        signal = once(t["q1"], t["k1"], t["v"])
        if calls == 1:
            return signal
        noise = once(t["q2"], t.get("k2", t["k1"]), t["v"])
        return combine(signal, noise, t["lambda"], **epilogue(t))

    return run


def forms(case: AttentionCase, attend: Attend, calls: int) -> list[tuple[str, Function]]:
    """A kernel as it is and, where heads or widths need it, with inputs widened or repeated."""
    heads = case.heads
    found = [("", attend)]
    if any(heads[q] != heads[k] for q, k in (("q1", "k1"), ("q2", "k2")) if q in heads):
        found.append(("repeated", repeated(attend)))
    if calls < 4 and case.layout.head_dim != case.layout.v_head_dim:
        found += [(", ".join(filter(None, ("padded", name))), padded(form)) for name, form in list(found)]
    return [(name, compose(form, calls)) for name, form in found]


def padded(attend: Attend) -> Attend:
    """For kernels with one width: zeros widen the narrower of (q, k) and v."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = max(q.shape[-1], v.shape[-1])
        q, k, value = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
        return attend(q, k, value)[..., : v.shape[-1]]

    return run


def repeated(attend: Attend) -> Attend:
    """For kernels without grouped queries: key and value heads are repeated."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[-2] // k.shape[-2]
        return attend(q, *(t.repeat_interleave(times, dim=-2) if times > 1 else t for t in (k, v)))

    return run


def first_of(result: Any) -> Tensor:
    """The output; some functions give the log-sum-exp too."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def known_options(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those options that a function takes."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in parameters}
