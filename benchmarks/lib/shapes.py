"""Cases: rows, and attention layouts at a size. Their inputs, and the work that they need."""

import functools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.bench import DTYPES

DIRECTIONS = ("forward", "backward", "both")
NORM_EPS = 1e-5
OUT_SCALE = 0.8
_SHORTEST_DOCUMENT = 16

Draw = Callable[..., Tensor]
"""``draw(*shape, dtype=None)``: normal random numbers, in the case's dtype or the one given."""


def draw_from(seed: int, dtype: torch.dtype, device: torch.device) -> Draw:
    """A source of random tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    standard = dtype

    def draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # In place and in its own dtype: a cache may take most of the memory.
        return torch.empty(shape, dtype=dtype or standard, device=device).normal_(generator=generator)

    return draw


@dataclass(frozen=True)
class Layout:
    """Heads, their widths, mask and epilogue of one kind of attention; causal."""

    label: str
    signal_heads: int
    """All query heads, where there are no noise heads."""
    noise_heads: int
    """0 for softmax attention."""
    kv_heads: int
    head_dim: int
    v_head_dim: int
    latent: bool = False
    """Decoded only: the first v_head_dim columns of the one key are the value."""
    shared_keys: bool = False
    """One key for signal and noise, one lambda for each token and signal head: DIFF V2."""
    gate: bool = False
    """A sigmoid gate in the place of the sub-norm."""
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
        return bool(self.noise_heads) and not self.shared_keys and not self.gate

    def flops_per_pair(self) -> dict[str, int]:
        """What a visible pair of query and key costs, over all heads.

        Forward: two products for each map. Backward, in one pass: for each signal head its logits
        again, dP, dV, dQ and dK; a noise head shares dP and dV and has three products left.
        """
        d, dv, signal, noise = self.head_dim, self.v_head_dim, self.signal_heads, self.noise_heads
        forward, backward = (signal + noise) * (2 * d + 2 * dv), signal * (6 * d + 4 * dv) + noise * 6 * d
        return dict(zip(DIRECTIONS, (forward, backward, forward + backward), strict=True))

    def describe(self) -> str:
        """In words."""
        return self.label + (f", window {self.window}" if self.window else ", packed" if self.packed else "")


def _softmax(head_dim: int, **rest: Any) -> Layout:
    # The same model as DIFF V1's, and with heads of 128 one of 4,096 with grouped queries.
    heads, kv = (32, 32) if head_dim == 64 else (32, 8)
    return Layout(f"softmax ({head_dim}, {head_dim})", heads, 0, kv, head_dim, head_dim, **rest)


def _v1(head_dim: int, **rest: Any) -> Layout:
    # A model of 2,048: twice as many heads of that width, in pairs.
    heads = 1024 // head_dim
    return Layout(f"DIFF V1 ({head_dim}, {2 * head_dim})", heads, heads, heads, head_dim, 2 * head_dim, **rest)


def _gda(ratio: int, head_dim: int, **rest: Any) -> Layout:
    # Motif-2-12.7B: 32 signal and 8 noise heads of 128, and 8 values of 256.
    return Layout(f"GDA {ratio}:1 ({head_dim}, {2 * head_dim})", 8 * ratio, 8, 8, head_dim, 2 * head_dim, **rest)


def _v2(head_dim: int, **rest: Any) -> Layout:
    # A model of 2,048 with 8 key and value heads.
    pairs = 2048 // head_dim
    return Layout(f"DIFF V2 ({head_dim}, {head_dim})", pairs, pairs, 8, head_dim, head_dim, shared_keys=True, **rest)


def _latent(**rest: Any) -> Layout:
    # Motif-3: 64 signal and 16 noise heads, 4 and 1 on each of 16 keys of 128 + 64.
    return Layout("GDLA 4:1 (192, 128)", 64, 16, 16, 192, 128, shared_keys=True, gate=True, **rest)


# The most telling ones first: time may run out.
LAYOUTS = {
    "v1_64": _v1(64, lengths=(4096, 16384, 512, 2048, 32768), flex=True),
    "softmax_64": _softmax(64, lengths=(4096, 16384), flex=True),
    "v1_128": _v1(128, lengths=(4096, 16384)),
    "v1_64_w128": _v1(64, window=128, flex=True),
    "v1_64_w512": _v1(64, window=512),
    "gda4_128": _gda(4, 128, lengths=(4096, 16384), flex=True),
    "softmax_128": _softmax(128, lengths=(4096, 16384), flex=True),
    "softmax_128_packed": _softmax(128, packed=True, lengths=(4096,), flex=True),
    "v1_64_packed": _v1(64, packed=True, lengths=(4096,), flex=True),
    "gda4_64": _gda(4, 64, lengths=(4096, 16384)),
    "gda4_128_w128": _gda(4, 128, window=128),
    "gda4_128_w512": _gda(4, 128, window=512),
    "v2_64": _v2(64),
    "v2_128": _v2(128),
    "gda4_128_packed": _gda(4, 128, packed=True, lengths=(4096,)),
    "gdla4_192": _latent(lengths=(4096, 16384)),
    "gdla4_192_w129": _latent(window=129),
    "gda2_64": _gda(2, 64),
    "gda2_128": _gda(2, 128),
    # Motif-3 in its absorbed form: all heads share a latent of 512 and 64 rotated columns.
    "gdla_latent": Layout("GDLA latents (576, 512)", 64, 16, 1, 576, 512, latent=True, shared_keys=True),
}
TRAINED = [name for name, layout in LAYOUTS.items() if not layout.latent]
"""The layouts of whole sequences."""


@dataclass(frozen=True)
class RowCase:
    """One function at one size.

    Tensors of two or more dimensions have a row (a token) for each index of the first; others are
    parameters. The output is like the first input.
    """

    function: str
    dtype: str
    rows: int
    columns: int
    """Elements of a row."""
    forward_bytes: int
    backward_bytes: int
    make: Callable[[Draw], dict[str, Tensor]]
    formula: Callable[..., Tensor]
    """The plain formula, of the inputs in order; in float64 where they are."""
    ours: Callable[..., Tensor]
    liger: Callable[..., Tensor] | None = None
    liger_in_place: bool = False
    """Whether liger-kernel writes its gradient over the incoming one."""
    directions: tuple[str, ...] = DIRECTIONS
    rows_apart: bool = True
    """Whether the formula of some of the rows gives their results; if not, parameters may have rows
    of their own.
    """

    def cell(self) -> dict[str, Any]:
        """What results of this case are filed under."""
        return {"function": self.function, "dtype": self.dtype, "rows": self.rows, "columns": self.columns}

    def describe(self) -> str:
        """In words."""
        return f"{self.function}, {self.dtype}, {self.rows:,} x {self.columns:,}"

    def bytes_moved(self) -> dict[str, int]:
        """The least bytes that each direction moves."""
        both = self.forward_bytes + self.backward_bytes
        return dict(zip(DIRECTIONS, (self.forward_bytes, self.backward_bytes, both), strict=True))

    def flops(self) -> None:
        """A few vector operations an element, without a matrix product."""


def mix_documents(total: int, longest: int) -> tuple[int, ...]:
    """Lengths that add up to ``total``: one is ``longest``, the others of all magnitudes."""
    source = random.Random(0)
    lengths = [min(longest, total)]
    while (left := total - sum(lengths)) > 0:
        magnitude = source.uniform(math.log(_SHORTEST_DOCUMENT), math.log(max(longest, _SHORTEST_DOCUMENT)))
        lengths.append(min(left, round(math.exp(magnitude))))
    source.shuffle(lengths)
    return tuple(lengths)


@dataclass(frozen=True)
class AttentionCase:
    """A layout at one size."""

    name: str
    """In :data:`LAYOUTS`."""
    layout: Layout
    dtype: str
    length: int
    """Of a sequence; in packed layouts of the longest document."""
    batch: int
    """Sequences; 1 in packed layouts."""
    kv_heads: int
    documents: tuple[int, ...] = ()
    """Their lengths, in packed layouts."""
    directions: tuple[str, ...] = DIRECTIONS

    @property
    def rows(self) -> int:
        """Tokens of a sequence, or of all documents."""
        return sum(self.documents) or self.length

    @property
    def queries(self) -> int:
        """The last so many tokens of a sequence ask."""
        return self.rows

    @property
    def heads(self) -> dict[str, int]:
        """Heads of every tensor that has them."""
        kv, whole = self.kv_heads, self.layout.kv_heads
        signal, noise = self.layout.signal_heads * kv // whole, self.layout.noise_heads * kv // whole
        found = {"q1": signal, "k1": kv, "q2": noise, "k2": kv, "v": kv, "lambda": signal, "output": signal}
        found |= {"gate": signal} if self.layout.gate else {}
        return found if noise else {name: found[name] for name in ("q1", "k1", "v", "output")}

    @property
    def calls(self) -> int:
        """Of softmax attention: for the signal, and for the noise where there is any."""
        return 2 if self.layout.noise_heads else 1

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
        return self.layout.head_dim**-0.5

    def cell(self) -> dict[str, Any]:
        """What results of this case are filed under."""
        tokens = self.rows * self.batch
        return {"layout": self.name, "dtype": self.dtype, "length": self.length, "batch": self.batch, "tokens": tokens}

    def describe(self) -> str:
        """In words."""
        length = f"documents up to {self.length:,}" if self.documents else f"{self.batch} x {self.length:,}"
        return f"{self.layout.describe()}, {self.dtype}, {length}"

    def document_starts(self) -> Tensor:
        """(rows,): where each token's sequence begins."""
        if not self.documents:
            return torch.zeros(self.rows, dtype=torch.int64)
        return torch.repeat_interleave(torch.tensor(self.bounds[:-1]), torch.tensor(self.documents))

    def first_keys(self) -> Tensor:
        """(queries,): the first key that each query sees; the last is its own."""
        first = self.document_starts()
        if self.layout.window is not None:
            first = torch.maximum(first, torch.arange(self.rows) - self.layout.window + 1)
        return first[self.rows - self.queries :]

    @functools.cached_property
    def pairs(self) -> int:
        """Visible pairs of query and key, for each head, over the batch."""
        own = torch.arange(self.rows - self.queries, self.rows)
        return self.batch * int((own - self.first_keys() + 1).sum())

    def flops(self) -> dict[str, int]:
        """What the mathematics needs in each direction."""
        kv, whole = self.kv_heads, self.layout.kv_heads
        return {d: self.pairs * flops * kv // whole for d, flops in self.layout.flops_per_pair().items()}

    def bytes_moved(self) -> dict[str, int]:
        """The least bytes that each direction moves: every tensor it needs or gives, once.

        Forward reads the inputs and writes the output. Backward reads them, the output and its
        gradient, and writes a gradient for each input. Parameters of a head's width or less are
        left out.
        """
        element = DTYPES[self.dtype].itemsize
        inputs = sum(math.prod(self.shape(name)) for name in self.names) * element
        if self.layout.shared_keys:
            inputs += torch.float32.itemsize * math.prod(self.shape("lambda"))
        output = element * math.prod(self.shape("output"))
        forward, backward = inputs + output, 2 * inputs + 2 * output
        return dict(zip(DIRECTIONS, (forward, backward, forward + backward), strict=True))

    @property
    def names(self) -> tuple[str, ...]:
        """The inputs that have heads and a width; "k2" is missing where the keys are shared."""
        if not self.layout.noise_heads:
            return ("q1", "k1", "v")
        names = ("q1", "k1", "q2", "v") if self.layout.shared_keys else ("q1", "k1", "q2", "k2", "v")
        return (*names, "gate") if self.layout.gate else names

    def shape(self, name: str) -> tuple[int, ...]:
        """(batch, rows, heads, width) of a tensor, without batch if packed."""
        rows = self.rows if name in ("k1", "k2", "v") else self.queries
        width: dict[str, tuple[int, ...]] = dict.fromkeys(("v", "output", "gate"), (self.layout.v_head_dim,))
        width["lambda"] = ()
        leading = (rows,) if self.documents else (self.batch, rows)
        return (*leading, self.heads[name], *width.get(name, (self.layout.head_dim,)))

    def make(self, draw: Draw) -> dict[str, Tensor]:
        """Random inputs."""
        inputs = {name: draw(*self.shape(name)) for name in self.names}
        if self.layout.noise_heads:
            logits = draw(*(self.shape("lambda") if self.layout.shared_keys else ()), dtype=torch.float32)
            # Not near 1: there the first rows, which see the same few values twice, cancel to
            # little but rounding.
            inputs["lambda"] = 0.2 + 0.5 * torch.sigmoid(logits)
        if self.layout.sub_norm:
            inputs["norm_weight"] = 1 + 0.1 * draw(self.layout.v_head_dim, dtype=torch.float32)
        return inputs


Case = RowCase | AttentionCase


def attention_case(name: str, dtype: str, length: int, *, tokens: int, head_divisor: int = 1) -> AttentionCase:
    """A layout at one length.

    Args:
        name: in :data:`LAYOUTS`.
        dtype: in :data:`benchmarks.lib.bench.DTYPES`.
        length: of a sequence, or of the longest document.
        tokens: of all sequences together; more where one is longer.
        head_divisor: leaves that fraction of the heads, whole groups of them.
    """
    layout = LAYOUTS[name]
    return AttentionCase(
        name=name,
        layout=layout,
        dtype=dtype,
        length=length,
        batch=1 if layout.packed else max(1, tokens // length),
        kv_heads=max(1, layout.kv_heads // head_divisor),
        documents=mix_documents(max(tokens, length), length) if layout.packed else (),
    )


def epilogue(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The keyword arguments, after lambda, of what follows the two attentions."""
    if "gate" in inputs:
        return {"gate": inputs["gate"]}
    if "norm_weight" not in inputs:
        return {}
    return {"norm_weight": inputs["norm_weight"], "norm_eps": NORM_EPS, "out_scale": OUT_SCALE}
