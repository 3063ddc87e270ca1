"""Attention by every way there is to compute it: time, peak memory, share of the roofline.

    python -m benchmarks.ops.attention            # a GPU: four minutes; two CPU cores: two to three
    python -m benchmarks.ops.attention --all      # every layout at 512 to 32K, and much longer
    python -m benchmarks.ops.attention --layouts v1_64 --lengths 4096 16384 --providers triton two

Every provider goes from queries, keys and values to the finished output and back to all gradients;
all is causal. *ours* are motif_kernels' backends. *one*, *two* and *four calls* compose softmax
attention of other libraries (torch's by cuDNN and flash, flash-attn 2 to 4): for layouts without
noise; for signal and noise; and each on half of the values. FlexAttention compiles for long, and by
default is measured at one length of a few layouts. Layouts (lib/shapes.py) are named for kind, D
and mask; all sequences together have --tokens. On a CPU there is an eighth of the heads. FLOPs are
those of visible pairs. How it is measured: benchmarks/README.md.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.providers import Function, Provider, compose, flex, forms, libraries
from benchmarks.lib.run import Aim, KernelBenchmark
from benchmarks.lib.shapes import DIRECTIONS, LAYOUTS, TRAINED, AttentionCase, attention_case, epilogue
from motif_kernels import diff_attn_func, diff_attn_varlen_func

_DOC = __doc__  # within the class it is another
LABELS = {
    "triton": "ours, deterministic",
    "triton_fast": "ours, non-deterministic",
    "cpu": "ours, cpu backend",
    "sdpa": "ours, sdpa backend",
    "flash": "ours, flash backend",
    "four": "four calls",
    "two": "two calls",
    "one": "one call",
    "flex": "FlexAttention",
    "naive": "naive formula",
}
OURS = ("triton", "triton_fast", "cpu", "sdpa")  # flash-attn may not serve all widths
_CALLS = {"one": 1, "two": 2, "four": 4}
ALL_LENGTHS = [512 << i for i in range(7)]
CPU_LAYOUTS = ["v1_64", "gda4_128", "v2_64", "softmax_64", "v1_64_w128", "v1_64_packed"]
QUICK_LAYOUTS = ["v1_64", "gda4_128_w128", "v2_64", "softmax_64", "v1_64_packed"]

# Largest error of an element, relative to |exact| + the root mean square: several times what
# rounding does to gradients of attention, far below what a wrong mask, a wrong head or an element
# that nothing wrote would show.
TOLERANCES = {"float32": 1e-3, "bf16": 0.15}

# The naive formula holds several maps in float32 at once, and its backward more.
_MAPS_AT_ONCE = 8
_CPU_BYTES_FOR_MAPS = 2 << 30


def providers(case: AttentionCase, names: Sequence[str], device: torch.device) -> list[Provider]:
    """Those of these names, each with every kernel that it could take."""
    found = []
    for name in names:
        if name in _CALLS:
            for variant, attend in libraries(case, device).items():
                found.append(Provider(name, forms(case, attend, _CALLS[name]), variant))
        elif name == "flex":
            function = compose(flex(case, device), case.calls)
            directions = ("forward",) if device.type == "cpu" else DIRECTIONS
            found.append(Provider(name, [("", function)], directions=directions))
        else:
            found.append(Provider(name, [("", ours(case, name, device))]))
    return found


def ours(case: AttentionCase, name: str, device: torch.device) -> Function:
    """motif_kernels by one of its backends."""
    options: dict[str, Any] = {
        "backend": {"triton_fast": "triton", "naive": "reference"}.get(name, name),
        "deterministic": name != "triton_fast",
        "causal": True,
        "window_size": case.window_size,
    }
    bounds = torch.tensor(case.bounds, dtype=torch.int32, device=device)
    longest = max(case.documents, default=0)
    packed = (bounds, bounds, longest, longest) if case.documents else ()
    call: Any = diff_attn_varlen_func if packed else diff_attn_func

    def run(t: Mapping[str, Tensor]) -> Tensor:
        noise = (t["q2"], t.get("k2", t["k1"])) if "q2" in t else (None, None)
        out = call(t["q1"], t["k1"], *noise, t["v"], t.get("lambda"), *packed, **options, **epilogue(t))
        assert isinstance(out, Tensor)  # no maximum logits were asked for
        return out

    return run


def _aim_of(mask: str, *head_dims: int) -> Any:
    """Causal, windowed or packed layouts with noise, and these widths; 4K to 16K tokens."""

    def applies(result: Mapping[str, Any]) -> bool:
        layout = LAYOUTS[result["layout"]]
        kind = "window" if layout.window else "packed" if layout.packed else "causal"
        of_size = kind != "causal" or 4096 <= result["length"] <= 16384
        return bool(layout.noise_heads) and kind == mask and of_size and head_dims in ((), layout_dims(result))

    return applies


def layout_dims(result: Mapping[str, Any]) -> tuple[int, int]:
    """D and Dv."""
    layout = LAYOUTS[result["layout"]]
    return layout.head_dim, layout.v_head_dim


_FUSED = ("triton", "triton_fast")
# flash-attn's own kernels, where they are installed, are such a composition as well.
_FOUR_CALLS = ("four", "flash")
AIMS = {
    "cuda": (
        Aim(
            "at least 1.3 times the best four calls, 4K to 16K", "speed", 1.3, _FUSED, _FOUR_CALLS,
            applies=_aim_of("causal", 64, 128),
        ),
        Aim(
            "at least 1.0 times the best four calls, 4K to 16K", "speed", 1.0, _FUSED, _FOUR_CALLS,
            applies=_aim_of("causal", 128, 256),
        ),
        Aim(
            "at least 1.5 times the best four calls on windows", "speed", 1.5, _FUSED, _FOUR_CALLS,
            applies=_aim_of("window"),
        ),
        Aim("peak memory at most that of two calls", "peak_bytes", 1.0, _FUSED, ("two",)),
    )
}  # fmt: skip


class Attention(KernelBenchmark):
    """Layouts with and without noise, by every way there is."""

    name, doc = "attention", _DOC
    labels, ours, tolerances, aims = LABELS, OURS, TOLERANCES, AIMS
    group, size, matrix = ("layout", "dtype"), "length", True
    rate = "tflops"
    numbers = ("lengths", "tokens", "head_divisor")
    providers = staticmethod(providers)

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        add("--layouts", nargs="+", choices=TRAINED, help=f"default: all, on a CPU {' '.join(CPU_LAYOUTS)}")
        add("--lengths", nargs="+", type=int, help="default: a few for each layout, on a CPU 512 2048")
        add("--all", action="store_true", help="all layouts, lengths of 512 to 32K, FlexAttention, no --limit")
        add("--tokens", type=int, help="of all sequences together; default 16384 on a GPU, 2048 on a CPU")
        add("--head-divisor", type=int, help="leave one of so many heads; default 1 on a GPU, 8 on a CPU")

    def set_defaults(self, arguments: argparse.Namespace, *, cuda: bool, quick: bool) -> None:
        """See :class:`KernelBenchmark`."""
        everything = arguments.all
        arguments.flex_everywhere = everything or (arguments.named and "flex" in arguments.providers)
        if arguments.layouts is None:
            arguments.layouts = QUICK_LAYOUTS if quick else TRAINED if cuda or everything else CPU_LAYOUTS
        if arguments.lengths is None:
            lengths = ALL_LENGTHS if everything else None if cuda else [512, 2048]
            arguments.lengths = [160] if quick else lengths
        arguments.tokens = arguments.tokens or (320 if quick else 16384 if cuda else 2048)
        arguments.head_divisor = arguments.head_divisor or (1 if cuda and not quick else 8)
        arguments.seconds = arguments.seconds or (0.02 if quick else 0.2 if cuda else 0.5)
        if arguments.limit is None and not everything:
            arguments.limit = 220.0 if cuda else 160.0

    def cases(self, arguments: argparse.Namespace) -> Iterator[AttentionCase]:
        """A layout after the other."""
        tokens, divisor = arguments.tokens, arguments.head_divisor
        for name, dtype in itertools.product(arguments.layouts, arguments.dtypes):
            for length in arguments.lengths or LAYOUTS[name].lengths:
                yield attention_case(name, dtype, length, tokens=tokens, head_divisor=divisor)

    def extra(self, arguments: argparse.Namespace) -> dict[str, Any]:
        """See :class:`KernelBenchmark`."""
        layouts = {n: LAYOUTS[n] for n in arguments.layouts}
        return {
            "layouts": {n: dataclasses.asdict(lay) | {"label": lay.describe()} for n, lay in layouts.items()},
            "documents": {f"{c.name} {c.length}": c.documents for c in self.cases(arguments) if c.documents},
        }

    def describe_group(self, result: Mapping[str, Any]) -> str:
        """See :class:`KernelBenchmark`."""
        return f"{LAYOUTS[result['layout']].describe()}, {result['dtype']}"

    def left_out(self, device: torch.device) -> dict[str, str]:
        """Providers that cannot run here at all, with the reason."""
        if device.type != "cuda":
            return dict.fromkeys(("triton", "triton_fast", "flash"), "it needs a GPU")
        elsewhere = {"cpu": "it needs a CPU"}
        installed = any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))
        return elsewhere if installed else elsewhere | {"flash": "flash-attn is not installed"}

    def unsupported(self, case: AttentionCase, name: str, arguments: argparse.Namespace) -> str | None:
        """Why a provider is not tried on a case, or None."""
        layout, cuda = case.layout, arguments.device == "cuda"
        if _CALLS.get(name, 0) > case.calls == 1:
            return "without noise one call is enough"
        if name == "one" and case.calls == 2:
            return "signal and noise are a call each"
        if name == "four" and layout.v_head_dim <= layout.head_dim:
            return "values are no wider than keys: there is nothing to split"
        if name == "naive":
            heads = case.heads["q1"] + case.heads.get("q2", 0)
            needed = _MAPS_AT_ONCE * 4 * case.batch * heads * case.rows**2
            # Half of it: what the allocator would else have to hand back slows all the others.
            limit = torch.cuda.get_device_properties(0).total_memory // 2 if cuda else _CPU_BYTES_FOR_MAPS
            if needed > limit:
                return f"its maps would take about {needed / 2**30:.0f} GiB"
        if name == "flex" and not arguments.flex_everywhere:
            lengths = arguments.lengths or layout.lengths
            chosen = layout.flex if cuda else case.name == arguments.layouts[0]
            if not (chosen and case.length == min(lengths, key=lambda n: abs(n - 4096))):
                return "it compiles for long: --providers flex or --all measures it everywhere"
        return None


BENCHMARK = Attention()
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
