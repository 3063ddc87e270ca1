"""What is tuned, and on which cases."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.providers import Function
from benchmarks.lib.shapes import AttentionCase, Case, Layout, RowCase
from benchmarks.ops import attention, combine, decode, poly_norm
from motif_kernels import tuning
from motif_kernels.impl.constants import POWER_SCALE

BACKEND = "attention_backend"
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """A case, and how motif_kernels is called on it."""

    case: Case
    function: Callable[[torch.device, Entry], Function]
    """Of an entry: the choice of a backend is an argument of the call."""


@dataclass(frozen=True)
class Kernel:
    """A kernel, or the choice of a backend, as the launch tables list it."""

    name: str
    direction: str
    """The pass of the public function that has this kernel in it, and is timed."""
    classes: Mapping[int | None, tuple[Sequence[Shape], Sequence[Shape]]]
    """Bound of the sizes that share an entry -> the cases that decide, and further ones to
    serve.
    """
    tolerance: float
    gluon: bool = True
    """Whether Gluon's kernels may serve the cases: they have no tables, and serve in place of the
    Triton kernels that have.
    """

    @contextlib.contextmanager
    def in_force(self, entry: Entry, others: Mapping[str, Entry] | None = None) -> Iterator[None]:
        """Within, launches take this entry, and these of other kernels."""
        from motif_kernels.impl.gluon import availability

        own: dict[str, Entry | None] = {} if self.name == BACKEND else {self.name: entry}
        if own:  # tensors here are aligned: without tensor descriptors only if there is no entry for them
            own[f"{self.name}_tma"] = None
        runs_on = availability.runs_on
        if not self.gluon:
            availability.runs_on = lambda device: False  # type: ignore[assignment]  # a stand-in without its cache
        try:
            with tuning.overriding(**(others or {}), **own):
                yield
        finally:
            availability.runs_on = runs_on


# Bound -> widths (D, Dv) that are timed, and further ones that the class must serve.
_WIDTHS: dict[int | None, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
    256: ((64, 64), ()),
    384: ((64, 128), ()),
    512: ((128, 128), ()),
    768: ((128, 256), ((96, 192), (192, 128))),
    None: ((256, 256), ()),
}


def _attention(d: int, dv: int, ratio: int, noise: int, length: int, batch: int = 2, **rest: Any) -> Shape:
    backend = rest.pop("backend", "triton")
    layout = Layout(f"({d}, {dv}), {ratio * noise}:{noise} heads", ratio * noise, noise, noise, d, dv, **rest)
    documents = (length,) * batch if layout.packed else ()
    case = AttentionCase("", layout, "bf16", length, 1 if documents else batch, noise, documents)
    return Shape(case, lambda device, entry: attention.ours(case, entry.get("backend", backend), device))


def _attention_kernel(name: str, direction: str) -> Kernel:
    classes = {}
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # Spills and shared memory depend on the mask, the epilogue and the mode.
        also = (
            _attention(d, dv, 1, 2, 1000, window=300, packed=True, shared_keys=True),
            _attention(d, dv, 3, 2, 1000, gate=True, backend="triton_fast"),
            *(_attention(*widths, 3, 2, 1000) for widths in others),
        )
        classes[up_to] = (_attention(d, dv, 4, 8, 4096), _attention(d, dv, 1, 1024 // d, 4096)), also
    return Kernel(name, direction, classes, attention.TOLERANCES["bf16"], gluon=name == BACKEND)


def _decode(d: int, dv: int, ratio: int, noise: int, length: int, batch: int) -> Shape:
    layout = Layout(f"({d}, {dv}), {ratio * noise}:{noise} heads", ratio * noise, noise, noise, d, dv)
    case = decode.DecodeCase("", layout, "bf16", length, batch, noise)
    return Shape(case, lambda device, entry: decode.ours(case, "triton", device))


def _decoding_kernel() -> Kernel:
    classes = {}
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # A cache that fills the GPU by its length, and one that does by its rows.
        timed = _decode(d, dv, 4, 8, 32768, 1), _decode(d, dv, 1, 1024 // d, 4096, 16)
        classes[up_to] = timed, tuple(_decode(*w, 3, 2, 1000, 3) for w in ((d, dv), *others))
    return Kernel("decoding_split", "forward", classes, attention.TOLERANCES["bf16"])


def _row(case: RowCase) -> Shape:
    return Shape(case, lambda device, entry: lambda t: case.ours(*t.values()))


def _poly_norm(rows: int, columns: int) -> Shape:
    return _row(poly_norm.case("mul_poly_norm", "bf16", rows, columns))


def _sum_formula(x: Tensor, grad: Tensor) -> Tensor:
    """What each process of a group computes on its part of a row: sums of powers and products."""
    x = x * POWER_SCALE
    return torch.stack([t.sum(-1) for t in (x**6, x**4, x**2, grad * x**3, grad * x**2, grad * x, grad)], dim=-1)


def _ours_sums(x: Tensor, grad: Tensor) -> Tensor:
    from motif_kernels.impl.triton import poly_norm as run

    products = run.product_sums(grad, x, None, hidden_clamp=None)
    return torch.cat([run.power_sums(x, hidden_clamp=None), products]).T


def _sums(rows: int, columns: int) -> Shape:
    case = RowCase(
        function="sums of PolyNorm",
        dtype="bf16",
        rows=rows,
        columns=columns,
        forward_bytes=3 * 2 * rows * columns,
        backward_bytes=0,
        make=lambda draw: {"x": draw(rows, columns), "grad": draw(rows, columns)},
        formula=_sum_formula,
        ours=_ours_sums,
        directions=("forward",),
    )
    return _row(case)


def _row_kernel(name: str, direction: str, shape: Callable[[int, int], Shape], bounds: Sequence[int]) -> Kernel:
    classes = {}
    for up_to in (*bounds, None):
        columns = (up_to or 2 * bounds[-1]) // 2
        # Tiles are powers of two.
        timed = tuple(shape((1 << 25) // n, n) for n in (columns, columns * 11 // 16))
        classes[up_to] = timed, (shape(7, columns - 3 if up_to else bounds[-1] + 5),)
    return Kernel(name, direction, classes, 0.06)


def _combine(width: int, ratio: int, noise_heads: int) -> Shape:
    layout = combine.Layout(f"{ratio * noise_heads}:{noise_heads} heads of {width}", ratio, width, 0, "sub-norm")
    return _row(combine.case(layout, "sub-norm", "bf16", 8192, width * ratio * noise_heads))


def _prepare(width: int, ratio: int, noise_heads: int) -> Shape:
    # Over short sequences: only the tokens matter to this kernel, and the others take little time.
    return _attention(64, width, ratio, noise_heads, 256, batch=32)


def _head_kernel(name: str, direction: str, shape: Callable[[int, int, int], Shape], tolerance: float) -> Kernel:
    classes = {}
    for up_to, width in ((128, 64), (256, 128), (None, 256)):
        timed = shape(width, 4, 8), shape(width, 1, 2048 // width)
        classes[up_to] = timed, (shape(width if up_to else 192, 3, 2),)
    return Kernel(name, direction, classes, tolerance)


def all_kernels() -> dict[str, Kernel]:
    """By name, in the order in which they take turns: what users wait for most first."""
    kernels = [
        _attention_kernel("attention_forward_tma", "forward"),
        _attention_kernel("attention_backward_keys_tma", "backward"),
        _attention_kernel("attention_backward_queries_tma", "backward"),
        _decoding_kernel(),
        _row_kernel("poly_norm_forward", "forward", _poly_norm, (2048, 4096, 8192, 16384, 32768, 65536)),
        _row_kernel("poly_norm_backward", "backward", _poly_norm, (2048, 4096, 8192, 16384, 32768)),
        _head_kernel("diff_combine_forward", "forward", _combine, 0.06),
        _head_kernel("diff_combine_backward", "backward", _combine, 0.06),
        _head_kernel("attention_prepare", "backward", _prepare, 0.15),
        _attention_kernel("attention_forward", "forward"),
        _attention_kernel("attention_backward_keys", "backward"),
        _attention_kernel("attention_backward_queries", "backward"),
        _attention_kernel(BACKEND, "both"),
        _row_kernel("poly_norm_sums", "forward", _sums, (2048,)),
    ]
    return {kernel.name: kernel for kernel in kernels}


MAIN: Mapping[str, Sequence[int | None]] = {
    "attention": (384, 768),  # (64, 128) and (128, 256)
    "decoding": (384, 768),
    "poly_norm": (8192, 16384, 32768),
    "diff": (256, None),
}
"""The classes of sizes that models have most, by the beginning of a kernel's name."""


def is_main(kernel: str, up_to: int | None) -> bool:
    """Whether a class is one of :data:`MAIN`."""
    return any(kernel.startswith(name) and up_to in bounds for name, bounds in MAIN.items())
