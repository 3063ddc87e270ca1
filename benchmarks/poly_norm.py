"""PolyNorm, alone and times the feed-forward's other branch: time, bandwidth and memory.

    python -m benchmarks.poly_norm                       # on a CPU two to three minutes on two cores
    python -m benchmarks.poly_norm --quick               # a smoke test, with no meaning
    python -m benchmarks.poly_norm --functions mul_poly_norm --columns 8192

Bytes an element, in bf16: PolyNorm reads x and writes y, 4 forward, and reads x and the gradient
and writes x's, 6 backward; with the product there is another input and another gradient, 6 and 10.
The three weights and the bias are float32. liger-kernel's PolyNorm writes its gradient over the
incoming one, as it does by default; it has no product, which is left to PyTorch as its users would.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import kernels
from benchmarks.kernels import DTYPES, Draw, Problem
from motif_kernels import mul_poly_norm, poly_norm
from motifarch.errors import UserError

EPS = 1e-6


def plain_poly_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula of arXiv 2411.03884 as one writes it down: float32 (float64 for float64) and one
    rounding.
    """
    return _plain(x, weight, bias).to(x.dtype)


def plain_mul_poly_norm(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same times ``up``, rounded after the product."""
    return (_plain(gate, weight, bias) * up).to(gate.dtype)


def _plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))

    def normalise(z: Tensor) -> Tensor:
        return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + EPS)

    return weight[0] * normalise(x**3) + weight[1] * normalise(x**2) + weight[2] * normalise(x) + bias


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return poly_norm(x, weight, bias, eps=EPS)


def _ours_mul(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mul_poly_norm(gate, up, weight, bias, eps=EPS)


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.poly_norm import LigerPolyNormFunction  # type: ignore[import-not-found]

    # Its gradient of the bias has no dimensions, and so must the bias.
    out: Tensor = LigerPolyNormFunction.apply(x, weight, bias.view(()), EPS, True)
    return out


def _liger_mul(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _liger(gate, weight, bias) * up


def _parameters(draw: Draw) -> dict[str, Tensor]:
    # About the initial third each, and all different, so that no two can be exchanged unseen.
    weight = torch.tensor([0.2, 0.3, 0.5]) + 0.01 * draw(3, dtype=torch.float32).cpu()
    bias = 0.1 * draw(1, dtype=torch.float32)
    return {"weight": weight.to(bias.device), "bias": bias}


def _inputs(names: tuple[str, ...], rows: int, columns: int, draw: Draw) -> dict[str, Tensor]:
    return {name: draw(rows, columns) for name in names} | _parameters(draw)


def problem(function: str, dtype: str, rows: int, columns: int) -> Problem:
    """PolyNorm ("poly_norm") or PolyNorm times up ("mul_poly_norm") on rows x columns."""
    product = function == "mul_poly_norm"
    branches = ("gate", "up") if product else ("x",)
    tensor = rows * columns * DTYPES[dtype].itemsize
    contenders: tuple[Callable[..., Tensor], ...] = (plain_poly_norm, _ours, _liger)
    if product:
        contenders = (plain_mul_poly_norm, _ours_mul, _liger_mul)
    formula, ours, liger = contenders
    return Problem(
        function=function,
        dtype=dtype,
        rows=rows,
        columns=columns,
        forward_bytes=(len(branches) + 1) * tensor,
        backward_bytes=(2 * len(branches) + 1) * tensor,
        make=functools.partial(_inputs, branches, rows, columns),
        formula=formula,
        ours=ours,
        liger=liger,
        liger_overwrites_gradient=not product,
    )


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """Every function at every length, as the (resolved) command line asks."""
    cuda = arguments.device == "cuda"
    rows = arguments.rows or (16 if arguments.quick else 8192 if cuda else 2048)
    lengths = [2048, 4096, 8192, 16384, 32768] if cuda else [2048, 8192]
    columns = arguments.columns or ([256] if arguments.quick else lengths)
    for function, dtype, length in itertools.product(arguments.functions, arguments.dtypes, columns):
        yield problem(function, dtype, rows, length)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = kernels.parser(
        "poly_norm", __doc__, rows="8192, on a CPU 2048", columns="2048 to 32768 in powers of two, on a CPU 2048 8192"
    )
    functions = ["poly_norm", "mul_poly_norm"]
    parser.add_argument("--functions", nargs="+", choices=functions, default=functions, help="default: both")
    arguments = parser.parse_args(argv)
    try:
        device = kernels.resolve(arguments)
        return kernels.run("poly_norm", problems(arguments), arguments, device, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
