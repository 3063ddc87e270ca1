"""What the decoding benchmark's kernels are given: one new token a row against a full cache, and
the exact output.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention_problems import LAYOUTS, Layout, describe, epilogue
from benchmarks.kernels import DTYPES
from motif_kernels import reference

DECODED = [n for n, layout in LAYOUTS.items() if not (layout.shared_keys or layout.window or layout.packed)]
"""The layouts that can be decoded here: keys in pairs, all of the cache visible."""

# Elements of keys and values that are turned to float64 at once.
_BLOCK = 1 << 26
# Beside the cache: the exact output's blocks, and what contenders allocate.
_ROOM = 3 << 30


@dataclass(frozen=True)
class Decoding:
    """A layout with a new token for each row, the last of those that its cache holds."""

    name: str
    """In :data:`benchmarks.attention_problems.LAYOUTS`."""
    layout: Layout
    dtype: str
    """In :data:`benchmarks.kernels.DTYPES`."""
    batch: int
    context: int
    """Tokens that each row's cache holds, the new one included."""
    kv_heads: int
    """Pairs of keys, and values."""

    @property
    def noise_heads(self) -> int:
        """All of them."""
        return self.kv_heads * self.layout.noise_per_kv

    @property
    def signal_heads(self) -> int:
        """All of them."""
        return self.noise_heads * self.layout.ratio

    @property
    def scale(self) -> float:
        """Of the logits."""
        return self.layout.width**-0.5

    @property
    def cache_bytes(self) -> int:
        """What must be read: each cached key and value once."""
        width = 2 * self.layout.width + self.layout.value_width
        return self.batch * self.context * self.kv_heads * width * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """What the mathematics needs: two products for each query head and cached token."""
        heads = self.signal_heads + self.noise_heads
        return self.batch * self.context * heads * 2 * (self.layout.width + self.layout.value_width)

    def cell(self) -> dict[str, Any]:
        """What results of this problem are filed under."""
        return {"layout": self.name, "dtype": self.dtype, "batch": self.batch, "context": self.context}

    def describe(self) -> str:
        """In words."""
        return f"{describe(self.layout)}, {self.dtype}, {self.batch} x {self.context:,}"

    def lengths(self, device: torch.device) -> Tensor:
        """(B,) int32: what each row's cache holds."""
        return torch.full((self.batch,), self.context, dtype=torch.int32, device=device)

    def make(self, device: torch.device) -> dict[str, Tensor]:
        """Random inputs, caches as the layers keep them: "k1" and "k2" are the halves of "keys".

        The oldest and the newest key are turned to the queries so far that together they weigh
        about as much as all the others: a kernel that leaves out an end, or a part, is then found
        out at any length.

        Returns:
            q1 (B, 1, Hs, D), q2 (B, 1, Hn, D), keys (B, S, Hk, 2D), k1, k2, v (B, S, Hk, Dv),
            lambda (), norm_weight.
        """
        generator = torch.Generator(device).manual_seed(0)
        dtype, d, dv = DTYPES[self.dtype], self.layout.width, self.layout.value_width

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            # In place and in its own dtype: a cache may take most of the memory.
            return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)

        keys = draw(self.batch, self.context, self.kv_heads, 2 * d)
        inputs = {
            "q1": draw(self.batch, 1, self.signal_heads, d),
            "k1": keys[..., :d],
            "q2": draw(self.batch, 1, self.noise_heads, d),
            "k2": keys[..., d:],
            "v": draw(self.batch, self.context, self.kv_heads, dv),
            "keys": keys,
            "lambda": 0.2 + 0.5 * torch.sigmoid(draw(dtype=torch.float32)),
            "norm_weight": 1 + 0.1 * draw(dv, dtype=torch.float32),
        }
        for q, k in (("q1", "k1"), ("q2", "k2")):
            mean = inputs[q].float().unflatten(2, (self.kv_heads, -1)).mean(3)
            wanted = math.log(max(self.context, 2)) / self.scale
            turned = mean * (wanted / mean.square().sum(-1, keepdim=True))
            inputs[k][:, :: max(1, self.context - 1)] = turned.to(dtype)
        return inputs


def decoding(name: str, dtype: str, batch: int, context: int, *, head_divisor: int = 1) -> Decoding:
    """A layout at one size.

    Args:
        name: in :data:`DECODED`.
        dtype: in :data:`benchmarks.kernels.DTYPES`.
        batch: rows.
        context: tokens that each row's cache holds.
        head_divisor: leaves that fraction of the heads, whole groups of them.
    """
    layout = LAYOUTS[name]
    kv_heads = max(1, layout.noise_heads // layout.noise_per_kv // head_divisor)
    return Decoding(name, layout, dtype, batch, context, kv_heads)


def too_large(problem: Decoding, free: int) -> str | None:
    """Why a problem does not fit ``free`` bytes of memory, or None."""
    needed = problem.cache_bytes + min(_ROOM, 4 * problem.cache_bytes)
    if needed <= free:
        return None
    return (
        f"its cache of {problem.cache_bytes / 2**30:,.1f} GiB and room to work take {needed / 2**30:,.1f} GiB, "
        f"and {free / 2**30:,.1f} GiB are free"
    )


class Exact:
    """The plain formula in float64 for the whole output.

    Attributes:
        grad: stands where a backward would be given its gradient; there is none.
    """

    def __init__(self, problem: Decoding, inputs: Mapping[str, Tensor]):
        shape = (problem.batch, 1, problem.signal_heads, problem.layout.value_width)
        device = inputs["q1"].device
        self.output = torch.empty(shape, dtype=torch.float64, device=device)
        self.grad = torch.empty(0, device=device)
        visible = torch.ones(1, problem.context, dtype=torch.bool, device=device)
        shared = {name: inputs[name].double() for name in ("lambda", "norm_weight")}
        step = max(1, _BLOCK // (problem.context * (2 * problem.layout.width + problem.layout.value_width)))
        for row in range(problem.batch):
            for start in range(0, problem.kv_heads, step):
                stop = min(start + step, problem.kv_heads)
                heads = {name: self._heads(problem, name, start, stop) for name in ("q1", "k1", "q2", "k2", "v")}
                parts = {name: inputs[name][row : row + 1, :, index].double() for name, index in heads.items()}
                out, _, _ = reference.diff_attention(
                    parts["q1"],
                    parts["k1"],
                    parts["q2"],
                    parts["k2"],
                    parts["v"],
                    shared["lambda"],
                    mask=visible,
                    softmax_scale=problem.scale,
                    **epilogue(shared),
                )
                self.output[row, :, heads["q1"]] = out[0]

    @staticmethod
    def _heads(problem: Decoding, name: str, start: int, stop: int) -> slice:
        """The heads of a tensor that go with some key and value heads."""
        counts = {"q1": problem.signal_heads, "q2": problem.noise_heads}
        share = counts.get(name, problem.kv_heads) // problem.kv_heads
        return slice(start * share, stop * share)

    def errors(self, found: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
        """How far "output" is off: the "largest" error, and the largest "relative" to |exact| +
        root mean square.
        """
        output = found["output"]
        if output.shape != self.output.shape:
            return {"output": {"largest": math.inf, "relative": math.inf}}
        off = (output.double() - self.output).abs()
        size = self.output.abs() + self.output.square().mean().sqrt()
        return {"output": {"largest": off.max().item(), "relative": (off / size).max().item()}}
