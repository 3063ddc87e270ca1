"""What is tried for each kernel: size classes, the cases that tell, and candidate entries."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.lib.exact import of_attention
from benchmarks.lib.measure import Case, MakeExact
from benchmarks.lib.providers import Function
from benchmarks.lib.rows import exact as row_exact
from benchmarks.lib.shapes import AttentionCase, Layout
from benchmarks.ops import attention, combine, decode, poly_norm

Entry = Mapping[str, Any]
BACKEND = "attention_backend"


@dataclass(frozen=True)
class Shape:
    """A case, and how motif_kernels is called on it."""

    case: Case
    function: Callable[[torch.device, Entry], Function]
    """Of an entry: the choice of a backend is an argument of the call."""
    exact: MakeExact


@dataclass(frozen=True)
class SizeClass:
    """The sizes that share an entry."""

    up_to: int | None
    timed: tuple[Shape, ...]
    """What decides."""
    also: tuple[Shape, ...] = ()
    """What the chosen entry must serve too: launch, without many spills, with right results."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or the choice of a backend, as the launch tables list it."""

    name: str
    direction: str
    """The pass of the public function that has this kernel in it, and is timed."""
    classes: tuple[SizeClass, ...]
    tolerance: float
    """As in the benchmarks: several times rounding, far below a missing tile."""
    spilled_bytes: int = 0
    """The most local memory that a thread of a candidate may use."""

    def describe(self, size_class: SizeClass) -> str:
        """A class in words."""
        where = "the rest" if size_class.up_to is None else f"up to {size_class.up_to:,} bytes"
        return f"{self.name}, {where}"


_LIMITS = {
    "block_m": (16, 256),
    "block_n": (16, 256),
    "num_warps": (2, 32),
    "tile_bytes": (512, 1 << 17),
    "tiles": (1, 64),
}


def neighbours(entry: Entry) -> list[Entry]:
    """The entry, then each that a field doubled or halved, a stage more or less, or another shape of tile gives."""
    changes: list[dict[str, Any]] = []
    for name, (least, most) in _LIMITS.items():
        if name in entry:
            changes += [{name: n} for n in (entry[name] * 2, entry[name] // 2) if least <= n <= most]
    if "num_stages" in entry:
        changes += [{"num_stages": n} for n in (entry["num_stages"] + 1, entry["num_stages"] - 1) if n >= 1]
    if {"block_m", "block_n"} <= entry.keys():
        m, n = entry["block_m"], entry["block_n"]
        changes += [{"block_m": a, "block_n": b} for a, b in ((m * 2, n // 2), (m // 2, n * 2)) if min(a, b) >= 16]
    if "maxnreg" in entry:
        changes += [{"maxnreg": n} for n in (96, 128, 168) if n != entry["maxnreg"]]
    if "backend" in entry:
        changes += [{"backend": name} for name in ("triton", "flash", "sdpa") if name != entry["backend"]]
    return [entry, *({**entry, **change} for change in changes)]


# up_to -> widths (D, Dv) that are timed, and further ones that the class must serve.
_WIDTHS: dict[int | None, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
    256: ((64, 64), ()),
    384: ((64, 128), ()),
    512: ((128, 128), ()),
    None: ((128, 256), ((192, 128), (96, 192))),
}


def _attention(d: int, dv: int, ratio: int, noise: int, length: int, batch: int = 2, **rest: Any) -> Shape:
    backend = rest.pop("backend", "triton")
    label = f"({d}, {dv}), {ratio * noise}:{noise} heads"
    layout = Layout(label, ratio * noise, noise, noise, d, dv, **rest)
    documents = (length,) * batch if layout.packed else ()
    case = AttentionCase("", layout, "bf16", length, 1 if documents else batch, noise, documents)

    def function(device: torch.device, entry: Entry) -> Function:
        return attention.ours(case, entry.get("backend", backend), device)

    return Shape(case, function, of_attention)


def _attention_shapes(up_to: int | None) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    (d, dv), others = _WIDTHS[up_to]
    timed = _attention(d, dv, 4, 8, 4096), _attention(d, dv, 1, 1024 // d, 4096)
    # Spills and shared memory depend on the mask, the epilogue and the mode.
    also = (
        _attention(d, dv, 1, 2, 1000, window=300, packed=True, shared_keys=True),
        _attention(d, dv, 3, 2, 1000, gate=True, backend="triton_fast"),
        *(_attention(*widths, 3, 2, 1000) for widths in others),
    )
    return timed, also


def _attention_kernel(name: str, direction: str, spilled_bytes: int = 0) -> Kernel:
    classes = tuple(SizeClass(up_to, *_attention_shapes(up_to)) for up_to in _WIDTHS)
    return Kernel(name, direction, classes, 0.15, spilled_bytes)


def _decode(d: int, dv: int, ratio: int, noise: int, length: int, batch: int) -> Shape:
    layout = Layout(f"({d}, {dv}), {ratio * noise}:{noise} heads", ratio * noise, noise, noise, d, dv)
    case = decode.DecodeCase("", layout, "bf16", length, batch, noise)
    exact = functools.partial(of_attention, backward=False)
    return Shape(case, lambda device, entry: decode.ours(case, "triton", device), exact)


def _decoding_kernel() -> Kernel:
    classes = []
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # A cache that fills the GPU by its length, and one that does by its rows.
        timed = _decode(d, dv, 4, 8, 32768, 1), _decode(d, dv, 1, 1024 // d, 4096, 16)
        classes.append(SizeClass(up_to, timed, tuple(_decode(*w, 3, 2, 1000, 3) for w in ((d, dv), *others))))
    return Kernel("decoding_split", "forward", tuple(classes), 0.15, spilled_bytes=64)


def _rows(rows: int, columns: int) -> Shape:
    case = poly_norm.case("mul_poly_norm", "bf16", rows, columns)
    return Shape(case, lambda device, entry: lambda t: case.ours(*t.values()), row_exact)


def _row_kernel(name: str, bounds: Sequence[int]) -> Kernel:
    classes = []
    for up_to in (*bounds, None):
        columns = (up_to or 2 * bounds[-1]) // 2
        # Tiles are powers of two.
        timed = tuple(_rows((1 << 25) // n, n) for n in (columns, columns * 11 // 16))
        classes.append(SizeClass(up_to, timed, (_rows(7, columns - 3 if up_to else bounds[-1] + 5),)))
    return Kernel(name, name.removeprefix("poly_norm_"), tuple(classes), 0.06)


def _epilogue(width: int, ratio: int, noise_heads: int) -> Shape:
    layout = combine.Layout(f"{ratio * noise_heads}:{noise_heads} heads of {width}", ratio, width, 0, "sub-norm")
    case = combine.case(layout, "sub-norm", "bf16", 8192, width * ratio * noise_heads)
    return Shape(case, lambda device, entry: lambda t: case.ours(*t.values()), row_exact)


def _prepare(width: int, ratio: int, noise_heads: int) -> Shape:
    # Over short sequences: only the tokens matter to this kernel, and the others take little time.
    return _attention(64, width, ratio, noise_heads, 256, batch=32)


def _head_kernel(name: str, direction: str, shape: Callable[[int, int, int], Shape], tolerance: float) -> Kernel:
    classes = []
    for up_to, width in ((128, 64), (256, 128), (None, 256)):
        timed = shape(width, 4, 8), shape(width, 1, 2048 // width)
        classes.append(SizeClass(up_to, timed, (shape(width if up_to else 192, 3, 2),)))
    return Kernel(name, direction, tuple(classes), tolerance)


def all_kernels() -> dict[str, Kernel]:
    """By name, in the order in which they are tuned: what users wait for most first.

    poly_norm_sums, which only a group of processes launches, is not among them.
    """
    kernels = [
        _attention_kernel("attention_forward", "forward", 64),
        _attention_kernel("attention_backward_keys", "backward", 512),
        _attention_kernel("attention_backward_queries", "backward", 512),
        _head_kernel("attention_prepare", "backward", _prepare, 0.15),
        _attention_kernel(BACKEND, "both"),
        _decoding_kernel(),
        _row_kernel("poly_norm_forward", (2048, 4096, 8192, 16384, 32768, 65536)),
        _row_kernel("poly_norm_backward", (2048, 4096, 8192, 16384)),
        _head_kernel("diff_combine_forward", "forward", _epilogue, 0.06),
        _head_kernel("diff_combine_backward", "backward", _epilogue, 0.06),
    ]
    return {kernel.name: kernel for kernel in kernels}
