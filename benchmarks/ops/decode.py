"""Decoding against a full key/value cache: the kernel beside what there was.

    python -m benchmarks.ops.decode             # on a GPU, a minute
    python -m benchmarks.ops.decode --batches 1 8 --contexts 131072 --providers triton two one

One new token for each row, all rows' caches full; the cache lies as the layers keep it, k1 and k2
side by side. *ours* is diff_attn_with_kvcache. *four* and *two calls* are as in attention; a kernel
that wants keys as wide as values gets both keys side by side, and queries with zeros where the
other's are. *one call* takes signal and noise in that way as heads of one call. FlexAttention is
measured only where it is named. Bytes are those of the cached keys and values, read once. How it is
measured: benchmarks/README.md.
"""

import argparse
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.lib.bench import DTYPES
from benchmarks.lib.providers import (
    Attend,
    Function,
    Provider,
    compose,
    first_of,
    flash_attn_modules,
    flex,
    known_options,
)
from benchmarks.lib.run import Aim, KernelBenchmark
from benchmarks.lib.shapes import LAYOUTS, AttentionCase, Draw, epilogue
from benchmarks.ops.attention import TOLERANCES
from motif_kernels import diff_attn_with_kvcache, diff_combine

DECODED = [n for n, lay in LAYOUTS.items() if lay.latent or not (lay.shared_keys or lay.window or lay.packed)]
"""The layouts that can be decoded here: keys in pairs, latents or no noise, all of the cache
visible.
"""
_DOC = __doc__  # within the class it is another
LABELS = {
    "triton": "ours",
    "sdpa": "ours, sdpa backend",
    "four": "four calls",
    "two": "two calls",
    "one": "one call",
    "flex": "FlexAttention",
}
OURS = ("triton", "sdpa")
_LONG = 32768


@dataclass(frozen=True)
class DecodeCase(AttentionCase):
    """A layout with a new token for each row, the last of those that its cache holds."""

    directions: tuple[str, ...] = ("forward",)

    @property
    def queries(self) -> int:
        """The new token."""
        return 1

    def cell(self) -> dict[str, Any]:
        """What results of this case are filed under."""
        return {"layout": self.name, "dtype": self.dtype, "batch": self.batch, "context": self.length}

    def bytes_moved(self) -> dict[str, int]:
        """What must be read: each cached key and value once."""
        width = (
            self.layout.head_dim if self.layout.latent else self.calls * self.layout.head_dim + self.layout.v_head_dim
        )
        return {"forward": self.batch * self.length * self.kv_heads * width * DTYPES[self.dtype].itemsize}

    def make(self, draw: Draw) -> dict[str, Tensor]:
        """Random inputs, caches as the layers keep them: "k1" and "k2" are the halves of "keys".

        The oldest and the newest key are turned to the queries so far that together they weigh
        about as much as all the others: a kernel that leaves out an end, or a part, is then found
        out at any length.

        Returns:
            q1 (B, 1, Hs, D), k1 (B, S, Hk, D), v (B, S, Hk, Dv); with noise q2 (B, 1, Hn, D), k2,
            keys (B, S, Hk, 2D), lambda () and norm_weight.
        """
        if self.layout.latent:
            return self._make_latents(draw)
        d, pairs = self.layout.head_dim, (("q1", "k1"), ("q2", "k2"))[: self.calls]
        keys = draw(self.batch, self.length, self.kv_heads, len(pairs) * d)
        inputs = {"v": draw(*self.shape("v"))}
        for i, (q, k) in enumerate(pairs):
            inputs[q], inputs[k] = draw(*self.shape(q)), keys[..., i * d : (i + 1) * d]
            mean = inputs[q].float().unflatten(2, (self.kv_heads, -1)).mean(3)
            wanted = math.log(max(self.length, 2)) / self.scale
            turned = mean * (wanted / mean.square().sum(-1, keepdim=True))
            inputs[k][:, :: max(1, self.length - 1)] = turned.to(keys.dtype)
        if self.layout.noise_heads:
            inputs |= {"keys": keys, "lambda": 0.2 + 0.5 * torch.sigmoid(draw(dtype=torch.float32))}
            inputs["norm_weight"] = 1 + 0.1 * draw(self.layout.v_head_dim, dtype=torch.float32)
        return inputs

    def _make_latents(self, draw: Draw) -> dict[str, Tensor]:
        inputs = {name: draw(*self.shape(name)) for name in ("q1", "q2", "k1")}
        inputs["v"] = inputs["k1"][..., : self.layout.v_head_dim]
        return inputs | {"lambda": 0.2 + 0.5 * torch.sigmoid(draw(dtype=torch.float32))}


def decode_case(name: str, dtype: str, batch: int, context: int, *, head_divisor: int = 1) -> DecodeCase:
    """A layout at one size.

    Args:
        name: in :data:`DECODED`.
        dtype: in :data:`benchmarks.lib.bench.DTYPES`.
        batch: rows.
        context: tokens that each row's cache holds.
        head_divisor: leaves that fraction of the heads, whole groups of them.
    """
    layout = LAYOUTS[name]
    return DecodeCase(name, layout, dtype, context, batch, max(1, layout.kv_heads // head_divisor))


def providers(case: DecodeCase, names: Sequence[str], device: torch.device) -> list[Provider]:
    """Those of these names, each with every kernel that it could take."""
    found = []
    for name in names:
        if name in OURS:
            kernels: dict[str, list[tuple[str, Function]]] = {"": [("", ours(case, name, device))]}
        elif name == "flex":
            kernels = {"": [("", compose(flex(case, device), case.calls))]}
        else:
            calls = "latents" if case.layout.latent else name if case.calls == 2 else "plain"
            kernels = {variant: forms(calls, attend) for variant, attend in libraries(case, device).items()}
        found += [Provider(name, tried, variant, ("forward",)) for variant, tried in kernels.items()]
    return found


def _lengths(case: DecodeCase, device: torch.device) -> Tensor:
    """(B,) int32: what each row's cache holds."""
    return torch.full((case.batch,), case.length, dtype=torch.int32, device=device)


def ours(case: DecodeCase, backend: str, device: torch.device) -> Function:
    """diff_attn_with_kvcache by one of its backends."""
    lengths = _lengths(case, device)
    call: Any = diff_attn_with_kvcache

    def run(t: Mapping[str, Tensor]) -> Tensor:
        q1, k1, q2, k2, v, lam = (t.get(name) for name in ("q1", "k1", "q2", "k2", "v", "lambda"))
        k2 = k1 if case.layout.latent else k2
        out: Tensor = call(q1, k1, q2, k2, v, lam, lengths, causal=True, backend=backend, **epilogue(t))
        return out

    return run


def forms(name: str, attend: Attend) -> list[tuple[str, Function]]:
    """A kernel as four, two, one or plain calls; two join the keys where widths must agree."""
    if name == "latents":
        return [("", _one_of_latents(attend))]
    if name == "two":
        return [("", compose(attend, 2)), ("joined keys", _two_joined(attend))]
    return [("", _one_joined(attend) if name == "one" else compose(attend, 4 if name == "four" else 1))]


def _joined_queries(t: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Signal and noise queries with zeros where the other's keys are: (B, 1, heads, 2D)."""
    d = t["q1"].shape[-1]
    return F.pad(t["q1"], (0, d)), F.pad(t["q2"], (d, 0))


def _two_joined(attend: Attend) -> Function:
    """Two calls over the pairs of keys side by side: none is copied, each is read twice."""
    twice = compose(attend, 2)

    def run(t: Mapping[str, Tensor]) -> Tensor:
        signal, noise = _joined_queries(t)
        return twice({**t, "q1": signal, "q2": noise, "k1": t["keys"], "k2": t["keys"]})

    return run


def _one_joined(attend: Attend) -> Function:
    """One call: a key head's signal and noise queries are its heads, half of each zeros."""

    def run(t: Mapping[str, Tensor]) -> Tensor:
        kv_heads = t["keys"].shape[2]
        groups = [q.unflatten(2, (kv_heads, -1)) for q in _joined_queries(t)]
        out = attend(torch.cat(groups, dim=3).flatten(2, 3), t["keys"], t["v"]).unflatten(2, (kv_heads, -1))
        signal, noise = (part.flatten(2, 3) for part in out.split([q.shape[3] for q in groups], dim=3))
        return diff_combine(signal, noise, t["lambda"], **epilogue(t))

    return run


def _one_of_latents(attend: Attend) -> Function:
    """One call: all heads over the latents, which are padded to keys' width as values."""

    def run(t: Mapping[str, Tensor]) -> Tensor:
        width, signals = t["v"].shape[-1], t["q1"].shape[2]
        values = F.pad(t["v"], (0, t["k1"].shape[-1] - width))
        out = attend(torch.cat((t["q1"], t["q2"]), dim=2), t["k1"], values)[..., :width]
        return diff_combine(out[:, :, :signals], out[:, :, signals:], t["lambda"])

    return run


def libraries(case: DecodeCase, device: torch.device) -> dict[str, Attend]:
    """The softmax attentions to compose from, by the names of their kernels."""
    kernels = {"cuDNN": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
    if device.type != "cuda":
        return {"flash": sdpa(case.scale, SDPBackend.FLASH_ATTENTION)}
    lengths = _lengths(case, device)
    found = {name: sdpa(case.scale, getattr(SDPBackend, kernel)) for name, kernel in kernels.items()}
    return found | {n: flash_attn(module, case.scale, lengths) for n, module in flash_attn_modules()[0].items()}


def sdpa(scale: float, kernel: SDPBackend) -> Attend:
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


def flash_attn(module: Any, scale: float, lengths: Tensor) -> Attend:
    """What a generation of flash-attn reads a cache with.

    It is ``flash_attn_with_kvcache``; of one that has none, ``flash_attn_func``: all caches here
    are full.
    """
    function = getattr(module, "flash_attn_with_kvcache", None) or module.flash_attn_func
    # As many splits as the library thinks best.
    options = known_options(function, cache_seqlens=lengths, num_splits=0)
    return lambda q, k, v: first_of(function(q, k, v, softmax_scale=scale, causal=True, **options))


def _long(result: Mapping[str, Any]) -> bool:
    return bool(result["context"] >= _LONG)


_SHARED: dict[str, Any] = {"ours": ("triton",), "directions": ("forward",), "applies": _long}
AIMS = {
    "cuda": (
        Aim("at least 85% of copy bandwidth from 32K tokens", "copy_share", 0.85, **_SHARED),
        Aim("at least 1.8 times the best four calls from 32K tokens", "speed", 1.8, baselines=("four",), **_SHARED),
        Aim("at least 1.35 times the best two calls from 32K tokens", "speed", 1.35, baselines=("two",), **_SHARED),
    )
}


class Decode(KernelBenchmark):
    """Caches of several layouts, batches and lengths."""

    name, doc = "decode", _DOC
    labels, ours, tolerances, aims = LABELS, OURS, TOLERANCES, AIMS
    group, size, matrix = ("layout", "dtype", "batch"), "context", True
    numbers = ("batches", "contexts", "head_divisor")
    providers = staticmethod(providers)

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        add(
            "--layouts",
            nargs="+",
            choices=DECODED,
            default=["gda4_128", "v1_64", "softmax_128", "gdla_latent"],
            help="default: %(default)s",
        )
        add("--batches", nargs="+", type=int, help="rows; default 8 1 32 128, on a CPU 1 8")
        add("--contexts", nargs="+", type=int, help="tokens a row; default 32768 131072 8192 1024, on a CPU 1024 8192")
        add("--head-divisor", type=int, help="leave one of so many heads; default 1 on a GPU, 8 on a CPU")

    def set_defaults(self, arguments: argparse.Namespace, *, cuda: bool, quick: bool) -> None:
        """See :class:`KernelBenchmark`."""
        if not arguments.named:
            arguments.left_out["flex"] = "it compiles for long; --providers with flex among them measures it"
            arguments.providers.remove("flex")
        # The most telling ones first: time may run out.
        arguments.batches = arguments.batches or ([1, 2] if quick else [8, 1, 32, 128] if cuda else [1, 8])
        contexts = [96] if quick else [32768, 131072, 8192, 1024] if cuda else [1024, 8192]
        arguments.contexts = arguments.contexts or contexts
        arguments.head_divisor = arguments.head_divisor or (1 if cuda and not quick else 8)
        arguments.seconds = arguments.seconds or (0.01 if quick else 0.05 if cuda else 0.5)

    def cases(self, arguments: argparse.Namespace) -> Iterator[DecodeCase]:
        """All layouts at one size after the other."""
        sizes = arguments.contexts, arguments.batches, arguments.layouts, arguments.dtypes
        for context, batch, name, dtype in itertools.product(*sizes):
            yield decode_case(name, dtype, batch, context, head_divisor=arguments.head_divisor)

    def unsupported(self, case: DecodeCase, name: str, arguments: argparse.Namespace) -> str | None:
        """See :class:`KernelBenchmark`."""
        if case.layout.latent and name not in (*OURS, "one"):
            return "latents are one key for both maps: one call is enough"
        return "without noise one call is enough" if case.calls == 1 and name in ("two", "four") else None

    def left_out(self, device: torch.device) -> dict[str, str]:
        """See :class:`KernelBenchmark`."""
        if device.type == "cuda":
            return {"sdpa": "it reads the rows' lengths on the host, and would be timed waiting for the GPU"}
        return {"triton": "it needs a GPU"}

    def extra(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """See :class:`KernelBenchmark`."""
        missing = flash_attn_modules()[1] if arguments.device == "cuda" else {}
        return {"layouts": {n: LAYOUTS[n].describe() for n in arguments.layouts}, "flash_attn_missing": missing}

    def describe_group(self, result: Mapping[str, Any]) -> str:
        """See :class:`KernelBenchmark`."""
        return f"{LAYOUTS[result['layout']].describe()}, {result['dtype']}, {result['batch']} rows"


BENCHMARK = Decode()
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
