"""The ways to decode differential attention against a cache that the decoding benchmark
compares.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_contenders import Attend, Candidate, Function, compose
from benchmarks.attention_problems import epilogue
from benchmarks.decode_problems import Decoding
from motif_kernels import diff_attn_with_kvcache, diff_combine

CONTENDERS = {
    "triton": "ours",
    "sdpa": "ours, sdpa backend",
    "four": "four calls",
    "two": "two calls",
    "one": "one call, joined keys",
    "flex": "FlexAttention",
}
OURS = ("triton", "sdpa")

_FLASH_ATTN = {"flash-attn 4": "flash_attn.cute", "flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}
_TORCH_ON_GPU = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def unavailable(device: torch.device) -> dict[str, str]:
    """Contenders that cannot run here at all, with the reason."""
    if device.type == "cuda":
        return {"sdpa": "it reads the rows' lengths on the host, and would be timed waiting for the GPU"}
    return {"triton": "it needs a GPU"}


@functools.cache
def flash_attn_libraries() -> tuple[dict[str, Callable[..., Any]], dict[str, str]]:
    """What flash-attn reads a cache with, by generation, and for each generation without one the
    reason.

    It is ``flash_attn_with_kvcache``; of a generation that has none, ``flash_attn_func``: all
    caches here are full.
    """
    found: dict[str, Callable[..., Any]] = {}
    missing: dict[str, str] = {}
    for name, module_name in _FLASH_ATTN.items():
        try:
            module = importlib.import_module(module_name)
            found[name] = getattr(module, "flash_attn_with_kvcache", None) or module.flash_attn_func
        except Exception as error:  # a build for another torch, or a compiler that finds no GPU, can raise anything
            missing[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return found, missing


def candidates(problem: Decoding, names: Iterable[str], device: torch.device) -> list[Candidate]:
    """The contenders of those names, each with every kernel that it could take."""
    torch.compiler.reset()  # else the shapes of earlier problems make it compile for shapes of any size
    found = []
    for name in names:
        if name in OURS:
            found.append(Candidate(name, "", [("", ours(problem, name, device))], ("forward",)))
        elif name == "flex":
            forms = [("", compose(flex(problem, torch.compile), 2))]
            found.append(Candidate(name, "", forms, ("forward",)))
        else:
            for variant, attend in _libraries(problem, device).items():
                found.append(Candidate(name, variant, forms_of(name, attend), ("forward",)))
    return found


def ours(problem: Decoding, backend: str, device: torch.device) -> Function:
    """diff_attn_with_kvcache by one of its backends."""
    lengths = problem.lengths(device)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        q1, k1, q2, k2, v, lam = (t[name] for name in ("q1", "k1", "q2", "k2", "v", "lambda"))
        return diff_attn_with_kvcache(q1, k1, q2, k2, v, lam, lengths, causal=True, backend=backend, **epilogue(t))

    return run


def forms_of(name: str, attend: Attend) -> list[tuple[str, Function]]:
    """A kernel as four, two or one calls; two calls join the keys where it wants values as wide as
    keys.
    """
    if name == "four":
        return [("", compose(attend, 4))]
    if name == "two":
        return [("", compose(attend, 2)), ("joined keys", _two_joined(attend))]
    return [("", _one_joined(attend))]


def _joined_queries(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Signal and noise queries with zeros where the other's keys are: (B, 1, heads, 2D)."""
    d = t["q1"].shape[-1]
    return F.pad(t["q1"], (0, d)), F.pad(t["q2"], (d, 0))


def _two_joined(attend: Attend) -> Function:
    """Two calls over the pairs of keys as they lie side by side: no key is copied, each is read
    twice.
    """
    twice = compose(attend, 2)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        signal, noise = _joined_queries(t)
        return twice({**t, "q1": signal, "q2": noise, "k1": t["keys"], "k2": t["keys"]})

    return run


def _one_joined(attend: Attend) -> Function:
    """One call over them: a key head's signal and noise queries are its heads, half of each
    zeros.
    """

    def run(t: Mapping[str, Tensor]) -> Tensor:
        kv_heads = t["keys"].shape[2]
        groups = [q.unflatten(2, (kv_heads, -1)) for q in _joined_queries(t)]
        out = attend(torch.cat(groups, dim=3).flatten(2, 3), t["keys"], t["v"]).unflatten(2, (kv_heads, -1))
        signal, noise = (part.flatten(2, 3) for part in out.split([q.shape[3] for q in groups], dim=3))
        return diff_combine(signal, noise, t["lambda"], **epilogue(t))

    return run


def _libraries(problem: Decoding, device: torch.device) -> dict[str, Attend]:
    """The softmax attentions to compose from, by the names of their kernels."""
    if device.type != "cuda":
        return {"flash": scaled_dot_product(problem.scale, SDPBackend.FLASH_ATTENTION)}
    lengths = problem.lengths(device)
    found = {name: scaled_dot_product(problem.scale, kernel) for name, kernel in _TORCH_ON_GPU.items()}
    libraries, _ = flash_attn_libraries()
    return found | {name: flash_attn(function, problem.scale, lengths) for name, function in libraries.items()}


def scaled_dot_product(scale: float, kernel: SDPBackend) -> Attend:
    """The scaled_dot_product_attention of torch by one of its kernels.

    A single query has no later keys to hide, and so the query heads of a key head go in as its
    rows: every kernel takes that, also one without grouped queries.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = q[:, 0].unflatten(1, (k.shape[2], -1))
        # A kernel that is not to be had warns of every reason why.
        with sdpa_kernel(kernel), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), scale=scale)
        return out.flatten(1, 2)[:, None]

    return attend


def flash_attn(function: Callable[..., Any], scale: float, lengths: Tensor) -> Attend:
    """One of the functions of :func:`flash_attn_libraries`."""
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if "cache_seqlens" in parameters:
        options["cache_seqlens"] = lengths
    if "num_splits" in parameters:
        options["num_splits"] = 0  # as many as the library thinks best

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = function(q, k, v, **options)
        out: Tensor = result[0] if isinstance(result, tuple) else result  # some give the log-sum-exp too
        return out

    return attend


def flex(problem: Decoding, compile_: Callable[..., Any]) -> Attend:
    """FlexAttention through ``compile_``: with so few queries it takes its own split kernel."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = compile_(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tensors = [t.transpose(1, 2) for t in (q, k, v)]
        out: Tensor = compiled(*tensors, scale=problem.scale, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return attend
