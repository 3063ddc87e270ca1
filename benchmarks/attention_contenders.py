"""The ways to compute differential attention that the attention benchmark compares."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_problems import Problem, epilogue
from benchmarks.kernel_report import DIRECTIONS
from benchmarks.kernels import DTYPES
from motif_kernels import diff_attn_func, diff_attn_varlen_func, diff_combine
from motif_kernels import dispatch as public
from motif_kernels.impl import flash
from motif_kernels.reference import attention_mask

CONTENDERS = {
    "triton": "ours, deterministic",
    "triton_fast": "ours, non-deterministic",
    "sdpa": "ours, sdpa backend",
    "flash": "ours, flash backend",
    "four": "four calls",
    "two": "two calls",
    "flex": "FlexAttention",
    "naive": "naive formula",
}
OURS = ("triton", "triton_fast", "sdpa", "flash")
_BACKENDS = {"triton": "triton", "triton_fast": "triton", "sdpa": "sdpa", "flash": "flash", "naive": "reference"}

Function = Callable[[Mapping[str, Tensor]], Tensor]
"""Inputs by name -> the output."""
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Softmax attention of q, k and v, (batch, rows, heads, width), or (rows, heads, width) in packed
layouts.
"""

# The naive formula holds several maps in float32 at once, and its backward more.
_MAPS_AT_ONCE = 8
_CPU_BYTES_FOR_MAPS = 2 << 30


@dataclass(frozen=True)
class Candidate:
    """A contender, by one library's kernel."""

    contender: str
    variant: str
    """The kernel, where there are several."""
    forms: Sequence[tuple[str, Function]]
    """What to try, in order, with a name for each; the first that runs is taken."""
    directions: tuple[str, ...] = DIRECTIONS


def unavailable(device: torch.device) -> dict[str, str]:
    """Contenders that cannot run here at all, with the reason."""
    reasons: dict[str, str] = {}
    if device.type != "cuda":
        reasons |= dict.fromkeys(("triton", "triton_fast", "flash"), "it needs a GPU")
    elif flash.installed() is None:
        reasons["flash"] = "flash-attn is not installed"
    for name, backend in _BACKENDS.items():
        if backend not in public.BACKENDS:
            reasons[name] = f"motif_kernels has no backend {backend!r}"
    return reasons


def refusal(problem: Problem, name: str, device: torch.device) -> str | None:
    """Why a contender is not tried on a problem, or None."""
    if name == "four" and problem.layout.value_width == problem.layout.width:
        return "values are as wide as keys: there is nothing to split"
    if name == "flash":
        layout, dtype = problem.layout, DTYPES[problem.dtype]
        return flash.unsupported_reason(device=device, dtype=dtype, head_dim=layout.width, value_dim=layout.value_width)
    if name == "naive":
        heads = problem.heads["q1"] + problem.heads["q2"]
        needed = _MAPS_AT_ONCE * 4 * problem.batch * heads * problem.rows**2
        cuda = device.type == "cuda"
        # Half of it: what the allocator would else have to hand back slows all the others.
        limit = torch.cuda.get_device_properties(device).total_memory // 2 if cuda else _CPU_BYTES_FOR_MAPS
        if needed > limit:
            return f"its maps would take about {needed / 2**30:.0f} GiB"
    return None


def candidates(problem: Problem, names: Iterable[str], device: torch.device) -> list[Candidate]:
    """The contenders of those names, each with every kernel that it could take."""
    torch.compiler.reset()  # else the shapes of earlier problems make it compile for shapes of any size
    found = []
    for name in names:
        if name in ("two", "four"):
            for variant, attend in _libraries(problem, device).items():
                found.append(Candidate(name, variant, _forms(problem, attend, 4 if name == "four" else 2)))
        elif name == "flex":
            attend = flex(problem, device, torch.compile)
            function = compose(attend, 2)
            on_cpu = device.type == "cpu"
            forms = [("forward only" if on_cpu else "", _without_gradient(function) if on_cpu else function)]
            found.append(Candidate(name, "", forms, ("forward",) if on_cpu else DIRECTIONS))
        else:
            found.append(Candidate(name, "", [("", backend(problem, name, device))]))
    return found


def backend(problem: Problem, name: str, device: torch.device) -> Function:
    """motif_kernels by one of its backends."""
    fixed: dict[str, Any] = {
        "backend": _BACKENDS[name],
        "deterministic": name != "triton_fast",
        "causal": True,
        "window_size": problem.window_size,
    }
    bounds = torch.tensor(problem.bounds, dtype=torch.int32, device=device)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        q1, k1, q2, v, lam = (t[name] for name in ("q1", "k1", "q2", "v", "lambda"))
        k2, keywords = t.get("k2", k1), fixed | epilogue(t)
        if problem.documents:
            longest = max(problem.documents)
            out = diff_attn_varlen_func(q1, k1, q2, k2, v, lam, bounds, bounds, longest, longest, **keywords)
        else:
            out = diff_attn_func(q1, k1, q2, k2, v, lam, **keywords)
        assert isinstance(out, Tensor)  # no maximum logits were asked for
        return out

    return run


def compose(attend: Attend, calls: int) -> Function:
    """Differential attention from two calls of softmax attention, or from four, each on half of the
    values' width.
    """

    def once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if calls == 2:
            return attend(q, k, v)
        return torch.cat([attend(q, k, half) for half in v.chunk(2, dim=-1)], dim=-1)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        signal = once(t["q1"], t["k1"], t["v"])
        noise = once(t["q2"], t.get("k2", t["k1"]), t["v"])
        return diff_combine(signal, noise, t["lambda"], **epilogue(t))

    return run


def padded(attend: Attend) -> Attend:
    """For kernels with one width: zeros widen the narrower of (q, k) and v, and are cut off the
    output.
    """

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        wide = max(q.shape[-1], v.shape[-1])
        q, k, value = (F.pad(t, (0, wide - t.shape[-1])) if t.shape[-1] < wide else t for t in (q, k, v))
        return attend(q, k, value)[..., : v.shape[-1]]

    return run


def repeated(attend: Attend) -> Attend:
    """For kernels without grouped queries: key and value heads are repeated."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        times = q.shape[-2] // k.shape[-2]
        return (
            attend(q, k.repeat_interleave(times, dim=-2), v.repeat_interleave(times, dim=-2))
            if times > 1
            else (attend(q, k, v))
        )

    return run


def _forms(problem: Problem, attend: Attend, calls: int) -> list[tuple[str, Function]]:
    """A kernel as it is and, where heads or widths ask for it, with its inputs widened or
    repeated.
    """
    heads = problem.heads
    forms = [("", attend)]
    if heads["q1"] != heads["k1"] or heads["q2"] != heads["k2"]:
        forms.append(("repeated", repeated(attend)))
    if calls == 2 and problem.layout.width != problem.layout.value_width:
        forms += [(", ".join(filter(None, ("padded", name))), padded(form)) for name, form in list(forms)]
    return [(name, compose(form, calls)) for name, form in forms]


def _libraries(problem: Problem, device: torch.device) -> dict[str, Attend]:
    """The softmax attentions of torch itself for a problem's mask, by the names of their
    kernels.
    """
    if device.type == "cuda":
        if problem.documents or problem.layout.window:
            # scaled_dot_product_attention has no windows and no documents; the same flash kernel
            # behind this one does.
            return {"flash": varlen(problem, device)}
        return {
            "cuDNN": scaled_dot_product(problem, device, SDPBackend.CUDNN_ATTENTION),
            "flash": scaled_dot_product(problem, device, SDPBackend.FLASH_ATTENTION),
        }
    if problem.documents:
        return {"flash": by_document(problem, device)}
    return {"flash": scaled_dot_product(problem, device, SDPBackend.FLASH_ATTENTION)}


def scaled_dot_product(problem: Problem, device: torch.device, kernel: SDPBackend) -> Attend:
    """The scaled_dot_product_attention of torch by one of its kernels; a window is a mask, made
    here.
    """
    mask = None
    if problem.layout.window and not problem.documents:
        visible = attention_mask(problem.rows, problem.rows, window_size=problem.window_size, device=device)
        mask = torch.zeros(visible.shape, dtype=DTYPES[problem.dtype], device=device).masked_fill_(~visible, -torch.inf)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # A kernel that is not to be had warns of every reason why.
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(
                q.transpose(-3, -2),
                k.transpose(-3, -2),
                v.transpose(-3, -2),
                attn_mask=mask,
                is_causal=mask is None,
                scale=problem.scale,
                enable_gqa=q.shape[-2] != k.shape[-2],
            )
        return out.transpose(-3, -2)

    return attend


def by_document(problem: Problem, device: torch.device) -> Attend:
    """The same, a call for each packed document."""
    one = scaled_dot_product(problem, device, SDPBackend.FLASH_ATTENTION)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(problem.documents) for t in (q, k, v)), strict=True)
        return torch.cat([one(*(t[None] for t in part))[0] for part in parts])

    return attend


def varlen(problem: Problem, device: torch.device) -> Attend:
    """The flash attention of torch for packed documents, which has windows too."""
    bounds = torch.tensor(problem.bounds, dtype=torch.int32, device=device)
    longest = max(problem.documents, default=problem.length)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        # Not every torch has this option; those without it take grouped queries as they come.
        options: dict[str, Any] = {}
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = q.shape[-2] != k.shape[-2]
        packed = [t.flatten(0, -3) for t in (q, k, v)]
        out = varlen_attn(
            packed[0],
            packed[1],
            packed[2],
            bounds,
            bounds,
            longest,
            longest,
            scale=problem.scale,
            window_size=problem.window_size,
            **options,
        )
        assert isinstance(out, Tensor)  # no log-sum-exp was asked for
        return out.view(*q.shape[:-1], v.shape[-1])

    return attend


def flex(problem: Problem, device: torch.device, compile_: Callable[..., Any]) -> Attend:
    """FlexAttention through ``compile_``; its block mask is made here."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, document = problem.layout.window or 0, problem.document_starts().to(device)

    def causal(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def windowed(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    def packed(_: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    visible = packed if problem.documents else windowed if window else causal
    mask = create_block_mask(visible, None, None, problem.rows, problem.rows, device=str(device))
    compiled = compile_(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [(t[None] if problem.documents else t).transpose(1, 2) for t in (q, k, v)]
        gqa = q.shape[-2] != k.shape[-2]
        out: Tensor = compiled(*tensors, block_mask=mask, scale=problem.scale, enable_gqa=gqa)
        out = out.transpose(1, 2)
        return out[0] if problem.documents else out

    return attend


def _without_gradient(function: Function) -> Function:
    def run(t: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return function({name: tensor.detach() for name, tensor in t.items()})

    return run
