"""What `benchmarks.tune` tries: for each kernel its size classes, the problems that tell, and the
candidate entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.tune_problems import DTYPE, Attention, Decoding, Epilogue, Problem, Rows

Entry = Mapping[str, Any]

BACKEND = "attention_backend"


@dataclass(frozen=True)
class SizeClass:
    """The sizes that share an entry."""

    up_to: int | None
    timed: tuple[Problem, ...]
    """What decides."""
    also: tuple[Problem, ...]
    """What the chosen entry must serve too: launch, within the bound of spilled bytes, and give the
    same results.
    """
    candidates: tuple[Entry, ...]


@dataclass(frozen=True)
class Kernel:
    """A kernel, or the choice of a backend, as the launch tables list it."""

    name: str
    classes: tuple[SizeClass, ...]
    tolerance: float
    """Largest difference from the present entry's results, relative to |value| + root mean square:
    several times what another order of rounding does, far below what a tile that is missing or
    wrong would show.
    """
    spilled_bytes: int
    """The most local memory that a thread of a candidate may use."""


def _tiles(*choices: tuple[int, int, int, int]) -> tuple[Entry, ...]:
    """Entries of attention kernels from (block_m, block_n, num_warps, num_stages)."""
    return tuple(dict(zip(("block_m", "block_n", "num_warps", "num_stages"), c, strict=True)) for c in choices)


# Of each kernel for sizes of up to 384 ((64, 64) and (64, 128) in two-byte elements), up to 512
# ((128, 128)), and beyond. The larger the heads, the more registers a row of a tile takes, and the
# smaller the tiles that fit.
_ATTENTION = {
    "attention_forward": (
        _tiles(
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 1), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 3),
            (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2),
        ),
        _tiles(
            (128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 1), (128, 32, 8, 3), (128, 128, 8, 2), (64, 64, 4, 2),
            (64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 8, 3), (64, 128, 8, 2),
        ),
        _tiles(
            (64, 32, 8, 3), (64, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 4, 3),
            (128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 1), (128, 64, 8, 2),
        ),
    ),
    "attention_backward_keys": (
        _tiles(
            (128, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 2), (64, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2),
            (32, 64, 4, 2), (32, 64, 8, 2), (32, 128, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2),
        ),
        _tiles(
            (32, 64, 8, 2), (32, 64, 8, 1), (32, 64, 8, 3), (64, 64, 8, 1), (64, 64, 8, 2), (32, 128, 8, 2),
            (64, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2),
        ),
        _tiles(
            (32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 1), (64, 32, 8, 1), (64, 32, 8, 2), (32, 32, 8, 2),
            (32, 32, 4, 2), (16, 64, 8, 2), (32, 128, 8, 1),
        ),
    ),
    "attention_backward_queries": (
        _tiles(
            (128, 64, 8, 2), (128, 64, 8, 1), (128, 64, 8, 3), (128, 32, 8, 2), (128, 32, 4, 2), (64, 64, 4, 2),
            (64, 64, 4, 3), (64, 64, 8, 2), (64, 128, 8, 2), (128, 128, 8, 2),
        ),
        _tiles(
            (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 3),
            (128, 32, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2),
        ),
        _tiles(
            (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 3), (64, 64, 8, 1), (64, 64, 8, 2), (64, 32, 4, 2),
            (32, 64, 8, 2), (32, 64, 4, 2), (128, 32, 8, 1),
        ),
    ),
}  # fmt: skip

# up_to -> widths (D, Dv) that are timed, and further ones that the class must serve.
_WIDTHS: dict[int | None, tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
    256: ((64, 64), ()),
    384: ((64, 128), ()),
    512: ((128, 128), ()),
    None: ((128, 256), ((192, 128), (96, 192))),
}


def _attention_problems(widths: tuple[int, int], others: Iterable[tuple[int, int]]) -> tuple[tuple[Problem, ...], ...]:
    d, dv = widths
    timed = (
        Attention(d, dv, 4, 8, 4096, batch=2),
        Attention(d, dv, 1, 1024 // d, 4096, batch=2),
    )
    # Spills and shared memory depend on the mask, the epilogue and the mode.
    small = Attention(d, dv, 3, 2, 1000, batch=2)
    also = (
        dataclasses.replace(small, window=300, packed=True, epilogue="none", ratio=1),
        dataclasses.replace(small, causal=False, epilogue="gate", deterministic=False),
        *(dataclasses.replace(small, width=d, value_width=dv) for d, dv in others),
    )
    return timed, also


def _attention_kernel(name: str) -> Kernel:
    small, middle, large = _ATTENTION[name]
    candidates = {256: small, 384: small, 512: middle, None: large}
    classes = []
    for up_to, (widths, others) in _WIDTHS.items():
        timed, also = _attention_problems(widths, others)
        # The mode without determinism has no kernel of its own for queries.
        if name == "attention_backward_queries":
            also = tuple(dataclasses.replace(p, deterministic=True) if isinstance(p, Attention) else p for p in also)
        classes.append(SizeClass(up_to, timed, also, candidates[up_to]))
    return Kernel(name, tuple(classes), tolerance=0.15, spilled_bytes=64 if name == "attention_forward" else 512)


def _decoding_kernel() -> Kernel:
    # Few rows: what counts is how many bytes of keys and values are on their way at once.
    tiles = tuple(
        {"block_n": block_n, "num_warps": warps, "num_stages": stages}
        for block_n, warps, stages in (
            (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3), (32, 4, 4), (32, 8, 3),
            (128, 4, 1), (128, 4, 2), (128, 8, 2), (16, 4, 4),
        )
    )  # fmt: skip
    classes = []
    for up_to, ((d, dv), others) in _WIDTHS.items():
        # A cache that fills the GPU by its length, and one that does by its rows.
        timed = (Decoding(d, dv, 4, 8, 32768, batch=1), Decoding(d, dv, 1, 1024 // d, 4096, batch=16))
        small = Decoding(d, dv, 3, 2, 1000, batch=3)
        also = (
            dataclasses.replace(small, gate=True),
            *(dataclasses.replace(small, width=d, value_width=dv) for d, dv in others),
        )
        classes.append(SizeClass(up_to, timed, also, tiles))
    return Kernel("decoding_split", tuple(classes), tolerance=0.15, spilled_bytes=64)


def _row_tiles(size: int | None) -> tuple[Entry, ...]:
    """Tiles that hold a few rows or a part of one, at 16 to 64 bytes of x a thread."""
    tiles = (8192, 16384, 32768, 65536) if size is None else (size // 4, size // 2, size, 2 * size, 4 * size)
    return tuple(
        {"tile_bytes": tile, "num_warps": warps}
        for tile in tiles
        for warps in (4, 8, 16, 32)
        if 1024 <= tile <= 65536 and 16 <= tile // (32 * warps) <= 64
    )


def _row_kernel(name: str, bounds: Sequence[int]) -> Kernel:
    def rows(size: int) -> tuple[Problem, ...]:
        columns = size // DTYPE.itemsize
        return tuple(Rows((1 << 25) // c, c) for c in (columns, columns * 11 // 16))  # tiles are powers of two

    classes = [SizeClass(size, rows(size), (Rows(7, size // 2 - 3),), _row_tiles(size)) for size in bounds]
    classes.append(SizeClass(None, rows(2 * bounds[-1]), (Rows(7, bounds[-1] + 5),), _row_tiles(None)))
    return Kernel(name, tuple(classes), tolerance=0.06, spilled_bytes=0)


def _head_tiles() -> tuple[Entry, ...]:
    """At 4 to 32 bytes of noise a thread."""
    return tuple(
        {"tile_bytes": tile, "num_warps": warps}
        for tile in (1024, 2048, 4096, 8192)
        for warps in (2, 4, 8)
        if 4 <= tile // (32 * warps) <= 32
    )


def _walked_tiles() -> tuple[Entry, ...]:
    return tuple(
        {"tile_bytes": tile, "num_warps": warps, "tiles": tiles, **({"maxnreg": registers} if registers else {})}
        for tile, warps in ((1024, 2), (2048, 4), (4096, 4), (4096, 8))
        for tiles in (4, 8, 16)
        for registers in ((128, None) if tiles == 8 else (128,))
    )


def _head_kernel(name: str, candidates: tuple[Entry, ...], problem: Callable[..., Problem], tolerance: float) -> Kernel:
    classes = []
    for up_to, width in ((128, 64), (256, 128), (None, 256)):
        timed = (problem(width, 4, 8), problem(width, 1, 2048 // width))
        classes.append(SizeClass(up_to, timed, (problem(width if up_to else 192, 3, 2),), candidates))
    return Kernel(name, tuple(classes), tolerance=tolerance, spilled_bytes=0)


def _epilogue(width: int, ratio: int, noise_heads: int) -> Problem:
    return Epilogue(8192, noise_heads, ratio, width)


def _prepare(width: int, ratio: int, noise_heads: int) -> Problem:
    # The forward pass that comes before is over short sequences: only the tokens matter to this
    # kernel.
    return Attention(64, width, ratio, noise_heads, 256, batch=32)


def _backend() -> Kernel:
    from motif_kernels.dispatch import BACKENDS

    candidates = tuple({"backend": name} for name in BACKENDS if name not in ("auto", "reference"))
    classes = tuple(
        SizeClass(up_to, _attention_problems(widths, ())[0], (), candidates) for up_to, (widths, _) in _WIDTHS.items()
    )
    return Kernel(BACKEND, classes, tolerance=0.15, spilled_bytes=0)


def all_kernels() -> dict[str, Kernel]:
    """By name, in the order in which they are tuned: what users wait for most, and what others
    build on, first.
    """
    kernels = [
        *(_attention_kernel(name) for name in _ATTENTION),
        _head_kernel("attention_prepare", _walked_tiles(), _prepare, 0.15),
        _backend(),
        _decoding_kernel(),
        _row_kernel("poly_norm_forward", (2048, 4096, 8192, 16384, 32768, 65536)),
        _row_kernel("poly_norm_backward", (2048, 4096, 8192, 16384)),
        _row_kernel("poly_norm_sums", (2048, 8192)),
        _head_kernel("diff_combine_forward", _head_tiles(), _epilogue, 0.06),
        _head_kernel("diff_combine_backward", _walked_tiles(), _epilogue, 0.06),
    ]
    return {kernel.name: kernel for kernel in kernels}


def quick(kernel: Kernel) -> Kernel:
    """The same with tiny problems and two candidates for the smallest sizes only: a smoke test."""

    def small(problem: Problem) -> Problem:
        match problem:
            case Rows():
                return dataclasses.replace(problem, rows=5)
            case Epilogue():
                return dataclasses.replace(problem, tokens=20, noise_heads=2)
            case Decoding():
                return dataclasses.replace(problem, tokens=70, noise_heads=1, batch=2)
            case Attention():
                return dataclasses.replace(problem, tokens=70, noise_heads=1, batch=2, window=problem.window and 30)
        return problem

    first = kernel.classes[0]
    shrunk = dataclasses.replace(
        first,
        timed=tuple(small(p) for p in first.timed[:1]),
        also=tuple(small(p) for p in first.also[:1]),
        candidates=first.candidates[-2:],
    )
    return dataclasses.replace(kernel, classes=(shrunk,))
