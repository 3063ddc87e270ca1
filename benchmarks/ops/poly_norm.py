"""PolyNorm, alone and times the feed-forward's other branch: time, bandwidth and memory.

    python -m benchmarks.ops.poly_norm             # on two CPU cores two to three minutes
    python -m benchmarks.ops.poly_norm --functions mul_poly_norm --columns 8192

Bytes an element, in bf16: PolyNorm moves 4 forward and 6 backward, with the product 6 and 10. The
three weights and the bias are float32. liger-kernel's PolyNorm writes its gradient over the
incoming one, as it does by default; it has no product, which is left to PyTorch as its users would.
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
from motif_kernels import mul_poly_norm, poly_norm

EPS = 1e-6


def _formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """That of arXiv 2411.03884 as one writes it down, in float32 (float64 for float64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))

    def normalise(z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)

    return weight[0] * normalise(x**3) + weight[1] * normalise(x**2) + weight[2] * normalise(x) + bias


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _formula(x, weight, bias).to(x.dtype)


def _plain_mul(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (_formula(gate, weight, bias) * up).to(gate.dtype)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.poly_norm import LigerPolyNormFunction  # type: ignore[import-not-found]

    # Its gradient of the bias has no dimensions, and so must the bias.
    out: Tensor = LigerPolyNormFunction.apply(x, weight, bias.view(()), EPS, True)
    return out


def _liger_mul(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _liger(gate, weight, bias) * up


def _inputs(names: tuple[str, ...], rows: int, columns: int, draw: Draw) -> dict[str, Tensor]:
    # About the initial third each, and all different, so that no two can be exchanged unseen.
    weight = torch.tensor([0.2, 0.3, 0.5]) + 0.01 * draw(3, dtype=torch.float32).cpu()
    bias = 0.1 * draw(1, dtype=torch.float32)
    return {name: draw(rows, columns) for name in names} | {"weight": weight.to(bias.device), "bias": bias}


def case(function: str, dtype: str, tokens: int, columns: int) -> RowCase:
    """PolyNorm ("poly_norm") or PolyNorm times up ("mul_poly_norm") on tokens x columns."""
    product = function == "mul_poly_norm"
    branches = ("gate", "up") if product else ("x",)
    tensor = tokens * columns * DTYPES[dtype].itemsize
    return RowCase(
        function=function,
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=(len(branches) + 1) * tensor,
        backward_bytes=(2 * len(branches) + 1) * tensor,
        make=functools.partial(_inputs, branches, tokens, columns),
        formula=_plain_mul if product else _plain,
        ours=functools.partial(mul_poly_norm if product else poly_norm, eps=EPS),
        liger=_liger_mul if product else _liger,
        liger_in_place=not product,
    )


class PolyNorm(rows.RowBenchmark):
    """PolyNorm, alone and with the product."""

    default_rows = (8192, 2048)
    default_columns = "2048 to 32768 in powers of two, on a CPU 2048 8192"

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        super().add_options(add)
        functions = ["poly_norm", "mul_poly_norm"]
        add("--functions", nargs="+", choices=functions, default=functions, help="default: both")

    def cases(self, arguments: argparse.Namespace) -> Iterator[RowCase]:
        """Every function at every length."""
        lengths = [2048, 4096, 8192, 16384, 32768] if arguments.device == "cuda" else [2048, 8192]
        columns = arguments.columns or ([256] if arguments.quick else lengths)
        for function, dtype, length in itertools.product(arguments.functions, arguments.dtypes, columns):
            yield case(function, dtype, arguments.rows, length)


main = PolyNorm("poly_norm", __doc__).main

if __name__ == "__main__":
    sys.exit(main())
