"""PolyNorm times the other branch, with coefficients of each expert: time, bandwidth and memory.

    python -m benchmarks.ops.grouped_poly_norm
    python -m benchmarks.ops.grouped_poly_norm --experts 384 --columns 1280

Rows are shared out at random: with many experts some may have none. The options are Motif-3's:
sigmoid coefficients, clamps, a scale.
Bytes an element, in bf16: 6 forward and 10 backward.

The formula, also under torch.compile, gathers each row's coefficients. liger-kernel's PolyNorm
knows no groups: it is called for each expert's rows, whose number the host then has to know, and
the rest is left to PyTorch, as its users would.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import rows
from benchmarks.lib.bench import DTYPES
from benchmarks.lib.shapes import Draw, RowCase
from motif_kernels import grouped_mul_poly_norm

EPS = 1e-6
BIAS_CLAMP, HIDDEN_CLAMP, OUT_SCALE = 0.5, 1e6, 0.5


def _formula(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *, offsets: Tensor) -> Tensor:
    """As one writes it down, in float32 (float64 for float64)."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    x, u = (t.to(dtype).clamp(-HIDDEN_CLAMP, HIDDEN_CLAMP) for t in (gate, up))
    offsets = offsets.to(gate.device)
    expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device, dtype=torch.int32), right=True)
    w3, w2, w1 = torch.sigmoid(weight)[expert].split(1, dim=-1)

    def normalise(z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)

    y = w3 * normalise(x**3) + w2 * normalise(x**2) + w1 * normalise(x) + bias.clamp(-BIAS_CLAMP, BIAS_CLAMP)[expert]
    return ((y * u).clamp(-HIDDEN_CLAMP, HIDDEN_CLAMP) * OUT_SCALE).to(gate.dtype)


def _ours(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *, offsets: Tensor) -> Tensor:
    return grouped_mul_poly_norm(
        gate,
        up,
        weight,
        bias,
        offsets.to(gate.device),
        eps=EPS,
        sigmoid_weight=True,
        bias_clamp=BIAS_CLAMP,
        out_scale=OUT_SCALE,
        hidden_clamp=HIDDEN_CLAMP,
    )


def _liger(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor, *, offsets: Tensor) -> Tensor:
    from liger_kernel.ops.poly_norm import LigerPolyNormFunction  # type: ignore[import-not-found]

    gate, up = (t.clamp(-HIDDEN_CLAMP, HIDDEN_CLAMP) for t in (gate, up))
    counts = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    weights, biases = torch.sigmoid(weight).unbind(), bias.clamp(-BIAS_CLAMP, BIAS_CLAMP).flatten().unbind()
    parts = [
        LigerPolyNormFunction.apply(x, w, b, EPS, False)
        for x, w, b in zip(gate.split(counts), weights, biases, strict=True)
        if len(x)
    ]
    return (torch.cat(parts) * up).clamp(-HIDDEN_CLAMP, HIDDEN_CLAMP) * OUT_SCALE


def _inputs(tokens: int, columns: int, experts: int, draw: Draw) -> dict[str, Tensor]:
    weight, bias = draw(experts, 3, dtype=torch.float32), 0.3 * draw(experts, 1, dtype=torch.float32)
    return {"gate": draw(tokens, columns), "up": draw(tokens, columns), "weight": weight, "bias": bias}


def case(dtype: str, tokens: int, columns: int, experts: int) -> RowCase:
    """Rows of width ``columns`` over so many experts."""
    generator = torch.Generator().manual_seed(0)
    expert = torch.randint(experts, (tokens,), generator=generator)
    offsets = expert.bincount(minlength=experts).cumsum(0).to(torch.int32)
    tensor = tokens * columns * DTYPES[dtype].itemsize
    return RowCase(
        function=f"{experts} experts",
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=3 * tensor,
        backward_bytes=5 * tensor,
        make=functools.partial(_inputs, tokens, columns, experts),
        formula=functools.partial(_formula, offsets=offsets),
        ours=functools.partial(_ours, offsets=offsets),
        liger=functools.partial(_liger, offsets=offsets),
        rows_apart=False,
    )


class GroupedPolyNorm(rows.RowBenchmark):
    """PolyNorm with coefficients of each expert."""

    default_rows = (65536, 4096)
    default_columns = "1280, Motif-3's"

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        super().add_options(add)
        add("--experts", nargs="+", type=int, default=[384, 8], help="default: 384 8")

    def cases(self, arguments: argparse.Namespace) -> Iterator[RowCase]:
        """Every number of experts at every length."""
        columns = arguments.columns or ([256] if arguments.quick else [1280])
        for experts, dtype, length in itertools.product(arguments.experts, arguments.dtypes, columns):
            yield case(dtype, arguments.rows, length, experts)


main = GroupedPolyNorm("grouped_poly_norm", __doc__).main

if __name__ == "__main__":
    sys.exit(main())
