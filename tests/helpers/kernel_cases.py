"""Small calls of every kernel, forward and backward, for what must hold at any size: no stray
access, the same bits.

Sizes are such as kernels find hardest: rows that no tile divides, heads whose width is no power of
two, documents of one token, caches that end in the middle of a page.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.lib.bench import DTYPES
from benchmarks.lib.shapes import AttentionCase, Draw, Layout, RowCase, draw_from, epilogue
from benchmarks.ops import combine, poly_norm
from benchmarks.ops.attention import ours
from motif_kernels import diff_attn_with_kvcache

Results = dict[str, Tensor]
Call = Callable[[], Results]
"""Gives the output and, where there is a backward, the gradient of each input."""
Make = Callable[[Draw, str, torch.device, int], Call]
"""Random inputs of a dtype, on a device, of so many rows; -> the call on them."""


def differentiable(
    function: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], draw: Draw
) -> Call:
    """A call of ``function`` and its backward, from fresh leaves."""
    grad: Tensor | None = None

    def call() -> Results:
        nonlocal grad
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        out = function(leaves)
        grad = draw(*out.shape) if grad is None else grad
        gradients = torch.autograd.grad(out, list(leaves.values()), grad)
        return {"output": out.detach(), **dict(zip(leaves, gradients, strict=True))}

    return call


def attention(layout: Layout, draw: Draw, dtype: str, device: torch.device, rows: int, *, fast: bool = False) -> Call:
    """The fused attention on ``rows`` tokens or documents; ``fast`` is not deterministic."""
    documents = (1, rows, 17, rows // 2) if layout.packed else ()
    case = AttentionCase("", layout, dtype, rows, 1 if documents else 2, layout.kv_heads, documents)
    return differentiable(ours(case, "triton_fast" if fast else "triton", device), case.make(draw), draw)


def decode(draw: Draw, dtype: str, device: torch.device, rows: int, *, width: int, paged: bool) -> Call:
    """New tokens appended to caches of up to ``rows``, attended to in three parts."""
    heads, noise_heads, kv_heads, page = 8, 2, 1, 16
    pages = -(-rows // page)
    capacity = (3 * pages, page) if paged else (3, rows)
    keys, v = draw(*capacity, kv_heads, 2 * width), draw(*capacity, kv_heads, 2 * width)
    q1, q2 = draw(3, 1, heads, width), draw(3, 1, noise_heads, width)
    new = {name: draw(3, 1, kv_heads, size * width) for name, size in (("k1", 1), ("k2", 1), ("v", 2))}
    order = torch.randperm(3 * pages, generator=torch.Generator().manual_seed(0)).view(3, pages)
    lengths = torch.tensor([0, rows // 3, rows - 1], dtype=torch.int32, device=device)
    norm_weight = draw(2 * width, dtype=torch.float32)
    k1, k2 = keys.chunk(2, dim=-1)

    def call() -> Results:
        table = order.int().to(device) if paged else None
        options = epilogue({"norm_weight": norm_weight}) | {"num_splits": 3, "causal": True, "backend": "triton"}
        out = diff_attn_with_kvcache(q1, k1, q2, k2, v, 0.3, lengths, **new, block_table=table, **options)
        return {"output": out, "keys": keys, "values": v}

    return call


def _rows(case: RowCase, draw: Draw) -> Call:
    return differentiable(lambda t: case.ours(*t.values()), case.make(draw), draw)


def _poly_norm(function: str, columns: int, draw: Draw, dtype: str, device: torch.device, rows: int) -> Call:
    return _rows(poly_norm.case(function, dtype, rows, columns), draw)


def _combine(name: str, kind: str, draw: Draw, dtype: str, device: torch.device, rows: int) -> Call:
    layout = combine.LAYOUTS[name]
    return _rows(combine.case(layout, kind, dtype, rows, 3 * layout.ratio * layout.head_dim), draw)


_V1, _GDA = Layout("DIFF V1", 2, 2, 2, 64, 128), Layout("GDA 4:1", 8, 2, 2, 128, 256)
_V2 = Layout("DIFF V2", 4, 4, 2, 64, 64, shared_keys=True)
_ODD = Layout("GDA 3:1", 6, 2, 2, 96, 192, gate=True)
_WINDOW, _PACKED = Layout("DIFF V1", 2, 2, 2, 64, 128, window=24), Layout("GDA 4:1", 8, 2, 2, 64, 128, packed=True)

FAMILIES: dict[str, dict[str, Make]] = {
    "attention": {
        "DIFF V1": partial(attention, _V1),
        "GDA 4:1": partial(attention, _GDA),
        "DIFF V2": partial(attention, _V2),
        "DIFF V1 in a window": partial(attention, _WINDOW),
        "GDA 4:1 packed": partial(attention, _PACKED),
        "GDA 3:1 gated, 96 wide": partial(attention, _ODD),
        "softmax": partial(attention, Layout("softmax", 4, 0, 2, 64, 64)),
        "softmax packed": partial(attention, Layout("softmax", 4, 0, 1, 128, 128, packed=True)),
    },
    "one-pass attention": {
        "DIFF V1 in one pass": partial(attention, _V1, fast=True),
        "GDA 4:1 packed in one pass": partial(attention, _PACKED, fast=True),
    },
    "decode": {
        "decode": partial(decode, width=128, paged=False),
        "decode from pages, 96 wide": partial(decode, width=96, paged=True),
    },
    "poly_norm": {
        "PolyNorm": partial(_poly_norm, "poly_norm", 1000),
        "PolyNorm times up": partial(_poly_norm, "mul_poly_norm", 1000),
        "PolyNorm times up, long rows": partial(_poly_norm, "mul_poly_norm", 40003),
    },
    "combine": {
        f"{combine.LAYOUTS[layout].label}, {kind}": partial(_combine, layout, kind)
        for layout, kind in (("gda", "sub-norm"), ("gda", "gate"), ("diff_v1", "sub-norm"), ("diff_v2", "none"))
    },
}
"""Family -> name of the case -> how it is made."""

CASES = {name: make for family in FAMILIES.values() for name, make in family.items()}


def make(case: str, device: torch.device, rows: int) -> Call:
    """A case of :data:`CASES` with so many rows: bf16 on a GPU, float32 on a CPU."""
    dtype = "bf16" if device.type == "cuda" else "float32"
    # Drawn on the CPU: under a sanitizer every kernel of a GPU's generator would be looked at as
    # well.
    source = draw_from(0, DTYPES[dtype], torch.device("cpu"))

    def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return source(*shape, dtype=dtype).to(device)

    return CASES[case](draw, dtype, device, rows)
