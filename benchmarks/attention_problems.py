"""What the attention benchmark measures: layouts of heads, masks, inputs, and their work counted by
the mathematics.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_report import DIRECTIONS
from benchmarks.kernels import DTYPES, Draw

NORM_EPS = 1e-5
OUT_SCALE = 0.8
SHORTEST_DOCUMENT = 16


@dataclass(frozen=True)
class Layout:
    """Heads, their widths, mask and epilogue of one kind of differential attention."""

    label: str
    ratio: int
    """g, the signal heads for each noise head."""
    width: int
    """D, of a query or key head."""
    value_width: int
    """Dv."""
    noise_heads: int
    noise_per_kv: int = 1
    """Noise heads that share a key head and a value head."""
    shared_keys: bool = False
    """Signal and noise have the same keys, and lambda is one for each token and signal head: DIFF
    V2.
    """
    window: int | None = None
    """How many keys a query sees, its own included; None for all up to its own."""
    packed: bool = False
    """Documents of many lengths in one sequence."""
    lengths: tuple[int, ...] = (8192,)
    """Measured on a GPU by default."""
    flex: bool = False
    """Whether FlexAttention, long to compile, is measured by default."""

    @property
    def sub_norm(self) -> bool:
        """Whether RMSNorm follows the difference: DIFF V1 and GDA have it."""
        return not self.shared_keys

    def flops_per_pair(self) -> dict[str, int]:
        """What a visible pair of query and key costs each group of a noise head and its signal
        heads.

        Forward: two products for each of the g + 1 maps. Backward, in one pass: for each signal
        head its logits again, dP, dV, dQ and dK; the noise head shares dP and dV and has three
        products left.
        """
        d, dv = self.width, self.value_width
        forward = (self.ratio + 1) * (2 * d + 2 * dv)
        backward = self.ratio * (6 * d + 4 * dv) + 6 * d
        return dict(zip(DIRECTIONS, (forward, backward, forward + backward), strict=True))


def _v1(width: int, **rest: Any) -> Layout:
    # A model of 2,048: twice as many heads of that width, in pairs.
    return Layout(f"DIFF V1 ({width}, {2 * width})", 1, width, 2 * width, 1024 // width, **rest)


def _gda(ratio: int, width: int, **rest: Any) -> Layout:
    # Motif-2-12.7B: 32 signal and 8 noise heads of 128, and 8 values of 256.
    return Layout(f"GDA {ratio}:1 ({width}, {2 * width})", ratio, width, 2 * width, 8, **rest)


def _v2(width: int, **rest: Any) -> Layout:
    # A model of 2,048 with 8 key and value heads.
    pairs = 2048 // width
    return Layout(f"DIFF V2 ({width}, {width})", 1, width, width, pairs, pairs // 8, shared_keys=True, **rest)


# The most telling ones first: time may run out.
LAYOUTS = {
    "v1_64": _v1(64, lengths=(4096, 16384, 512, 2048, 32768), flex=True),
    "v1_128": _v1(128, lengths=(4096, 16384)),
    "v1_64_w128": _v1(64, window=128, flex=True),
    "v1_64_w512": _v1(64, window=512),
    "gda4_128": _gda(4, 128, lengths=(4096, 16384), flex=True),
    "v1_64_packed": _v1(64, packed=True, lengths=(4096,), flex=True),
    "gda4_64": _gda(4, 64, lengths=(4096, 16384)),
    "gda4_128_w128": _gda(4, 128, window=128),
    "gda4_128_w512": _gda(4, 128, window=512),
    "v2_64": _v2(64),
    "v2_128": _v2(128),
    "gda4_128_packed": _gda(4, 128, packed=True, lengths=(4096,)),
    "gda2_64": _gda(2, 64),
    "gda2_128": _gda(2, 128),
}


def describe(layout: Layout) -> str:
    """The layout in words."""
    mask = f", window {layout.window}" if layout.window else ", packed" if layout.packed else ""
    return layout.label + mask


def mix_documents(total: int, longest: int) -> tuple[int, ...]:
    """Lengths that add up to ``total``: one is ``longest``, the others are spread evenly over all
    magnitudes below.
    """
    source = random.Random(0)
    lengths = [min(longest, total)]
    while (left := total - sum(lengths)) > 0:
        magnitude = source.uniform(math.log(SHORTEST_DOCUMENT), math.log(max(longest, SHORTEST_DOCUMENT)))
        lengths.append(min(left, round(math.exp(magnitude))))
    source.shuffle(lengths)
    return tuple(lengths)


@dataclass(frozen=True)
class Problem:
    """A layout at one size; causal."""

    name: str
    """In :data:`LAYOUTS`."""
    layout: Layout
    dtype: str
    length: int
    """Of a sequence; in packed layouts of the longest document."""
    batch: int
    """Sequences; 1 in packed layouts."""
    noise_heads: int
    documents: tuple[int, ...] = ()
    """Their lengths, in packed layouts."""

    @property
    def rows(self) -> int:
        """Tokens of a sequence, or of all documents."""
        return sum(self.documents) or self.length

    @property
    def heads(self) -> dict[str, int]:
        """Heads of every tensor that has them."""
        noise = self.noise_heads
        kv = noise // self.layout.noise_per_kv
        signal = noise * self.layout.ratio
        return {"q1": signal, "k1": kv, "q2": noise, "k2": kv, "v": kv, "lambda": signal, "output": signal}

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where sequences begin and end when all tokens stand in one row: cu_seqlens."""
        lengths = self.documents or (self.length,) * self.batch
        return tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))

    @property
    def window_size(self) -> tuple[int, int]:
        """In FlashAttention's convention."""
        return (-1 if self.layout.window is None else self.layout.window - 1, 0)

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.layout.width**-0.5

    def cell(self) -> dict[str, Any]:
        """What results of this problem are filed under."""
        tokens = self.rows * self.batch
        return {"layout": self.name, "dtype": self.dtype, "length": self.length, "batch": self.batch, "tokens": tokens}

    def describe(self) -> str:
        """In words."""
        length = f"documents up to {self.length:,}" if self.documents else f"{self.batch} x {self.length:,}"
        return f"{describe(self.layout)}, {self.dtype}, {length}"

    def document_starts(self) -> Tensor:
        """(rows,): where each token's sequence begins."""
        if not self.documents:
            return torch.zeros(self.rows, dtype=torch.int64)
        return torch.repeat_interleave(torch.tensor(self.bounds[:-1]), torch.tensor(self.documents))

    def first_keys(self) -> Tensor:
        """(rows,): the first key that each query sees; the last is its own."""
        first = self.document_starts()
        if self.layout.window is not None:
            first = torch.maximum(first, torch.arange(self.rows) - self.layout.window + 1)
        return first

    @functools.cached_property
    def pairs(self) -> int:
        """Visible pairs of query and key, for each head, over the batch."""
        return self.batch * int((torch.arange(self.rows) - self.first_keys() + 1).sum())

    def flops(self) -> dict[str, int]:
        """What the mathematics needs in each direction."""
        return {d: self.pairs * self.noise_heads * flops for d, flops in self.layout.flops_per_pair().items()}

    def bytes_moved(self) -> dict[str, int]:
        """The least bytes that each direction moves: every tensor it needs or gives, once.

        Forward reads the inputs and writes the output. Backward reads them, the output and its
        gradient, and writes a gradient for each input. Parameters of a head's width or less are
        left out.
        """
        element = DTYPES[self.dtype].itemsize
        names = ["q1", "k1", "q2", "v"] + ([] if self.layout.shared_keys else ["k2"])
        inputs = element * sum(math.prod(self.shape(name)) for name in names)
        if self.layout.shared_keys:
            inputs += torch.float32.itemsize * math.prod(self.shape("lambda"))
        output = element * math.prod(self.shape("output"))
        forward, backward = inputs + output, 2 * inputs + 2 * output
        return dict(zip(DIRECTIONS, (forward, backward, forward + backward), strict=True))

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor with heads: (batch, rows, heads, width), without batch in packed layouts;
        lambda has no width.
        """
        rows = (self.rows,) if self.documents else (self.batch, self.rows)
        width = {"lambda": (), "v": (self.layout.value_width,), "output": (self.layout.value_width,)}
        return (*rows, self.heads[name], *width.get(name, (self.layout.width,)))

    def make(self, draw: Draw) -> dict[str, Tensor]:
        """Random inputs; "k2" is missing where the keys are shared."""
        names = ("q1", "k1", "q2", "v") if self.layout.shared_keys else ("q1", "k1", "q2", "k2", "v")
        inputs = {name: draw(*self.shape(name)) for name in names}
        logits = draw(*(self.shape("lambda") if self.layout.shared_keys else ()), dtype=torch.float32)
        # Not near 1: there the first rows, which see the same few values twice, cancel to little
        # but rounding.
        inputs["lambda"] = 0.2 + 0.5 * torch.sigmoid(logits)
        if self.layout.sub_norm:
            inputs["norm_weight"] = 1 + 0.1 * draw(self.layout.value_width, dtype=torch.float32)
        return inputs


def epilogue(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments, after lambda, of what follows the two attentions."""
    if "gate" in inputs:
        return {"gate": inputs["gate"]}
    if "norm_weight" not in inputs:
        return {}
    return {"norm_weight": inputs["norm_weight"], "norm_eps": NORM_EPS, "out_scale": OUT_SCALE}


def problem(name: str, dtype: str, length: int, *, tokens: int, head_divisor: int = 1) -> Problem:
    """A layout at one length.

    Args:
        name: in :data:`LAYOUTS`.
        dtype: in :data:`benchmarks.kernels.DTYPES`.
        length: of a sequence, or of the longest document.
        tokens: of all sequences together; more where one is longer.
        head_divisor: leaves that fraction of the heads, whole groups of them.
    """
    layout = LAYOUTS[name]
    kv_heads = max(1, layout.noise_heads // layout.noise_per_kv // head_divisor)
    return Problem(
        name=name,
        layout=layout,
        dtype=dtype,
        length=length,
        batch=1 if layout.packed else max(1, tokens // length),
        noise_heads=kv_heads * layout.noise_per_kv,
        documents=mix_documents(max(tokens, length), length) if layout.packed else (),
    )
