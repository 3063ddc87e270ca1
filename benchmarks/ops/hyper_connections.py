"""Hyper-connections around a sublayer that does nothing: time, bandwidth and memory.

    python -m benchmarks.ops.hyper_connections     # on two CPU cores three minutes

Four streams: what a sublayer reads, the maps with 20 iterations of Sinkhorn's, and the update.
Streams are read twice and written once forward, for the sublayer lies between: 14 tensors of a
hidden state's size. Backward it is 14 for the update and 13 for what was read, the other gradient
of the streams among them. The matrix (24, 4 E) and the biases are float32; liger-kernel multiplies
by it in the streams' dtype, and has no clamps.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import rows
from benchmarks.lib.bench import DTYPES
from benchmarks.lib.shapes import Draw, RowCase
from motif_kernels import read_streams, reference, stream_maps, update_streams

STREAMS, ITERATIONS = 4, 20
PRODUCTS = STREAMS * (STREAMS + 2)


def _block(functions: Any, streams: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    read, products = functions[0](streams, weight.view(PRODUCTS, -1), bias[:STREAMS])
    post, mix = functions[1](products, bias[STREAMS:], iterations=ITERATIONS)
    out: Tensor = functions[2](streams, read, post, mix)
    return out


_ours = functools.partial(_block, (read_streams, stream_maps, update_streams))
_plain = functools.partial(_block, (reference.read_streams, reference.stream_maps, reference.update_streams))


def _liger(streams: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops import mhc  # type: ignore[import-not-found]

    matrix, one = weight.view(PRODUCTS, -1).mT.to(streams.dtype), torch.ones((), device=streams.device)
    numbers = True, ITERATIONS, 1e-6, 0.0, 0.0, 1.0  # float32, iterations, epsilons, the gates' factor
    pre, post, mix = mhc.LigerMHCCoeffsFunction.apply(streams, matrix, bias, one, one, one, *numbers)
    read = mhc.LigerMHCPreFunction.apply(streams, pre)
    out: Tensor = mhc.LigerMHCPostResFunction.apply(streams, read, post, mix)
    return out


def _inputs(tokens: int, columns: int, draw: Draw) -> dict[str, Tensor]:
    width = STREAMS * columns
    weight, bias = draw(PRODUCTS * width, dtype=torch.float32), draw(PRODUCTS, dtype=torch.float32)
    return {"streams": draw(tokens, STREAMS, columns), "weight": weight * width**-0.5, "bias": bias}


def case(dtype: str, tokens: int, columns: int) -> RowCase:
    """The block on streams (tokens, 4, columns)."""
    tensor = tokens * columns * DTYPES[dtype].itemsize
    return RowCase(
        function="hyper_connections",
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=(3 * STREAMS + 2) * tensor,
        backward_bytes=(6 * STREAMS + 3) * tensor,
        make=functools.partial(_inputs, tokens, columns),
        formula=_plain,
        ours=_ours,
        liger=_liger,
    )


class HyperConnections(rows.RowBenchmark):
    """Reading, maps and update."""

    default_rows = (8192, 1024)
    default_columns = "2048 and 4096"

    def cases(self, arguments: argparse.Namespace) -> Iterator[RowCase]:
        """Every width."""
        columns = arguments.columns or ([64] if arguments.quick else [2048, 4096])
        for dtype, width in itertools.product(arguments.dtypes, columns):
            yield case(dtype, arguments.rows, width)


main = HyperConnections("hyper_connections", __doc__).main

if __name__ == "__main__":
    sys.exit(main())
