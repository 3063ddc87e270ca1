"""Routing of tokens to experts: weights of the selected ones, and tokens to their rows and back.

    python -m benchmarks.ops.routing
    python -m benchmarks.ops.routing --functions rows --columns 4096

Motif-3's 384 experts, of which a token takes 8. *weights* goes from logits to the weights of the
selected experts, which are added to the scores: what follows uses both. *rows* sorts the tokens by
expert, copies them to the experts' rows and adds up what lies there, with nothing between. Eager is
the code before these operators: a stable sort, its inverse, tokens repeated and permuted, permuted
back and summed up.
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
from motif_kernels import combine_rows, dispatch_rows, expert_weights, select_experts, sort_by_expert

EXPERTS, TOP_K = 384, 8


@functools.cache
def _bias(device: torch.device) -> Tensor:
    return torch.zeros(EXPERTS, device=device)


def _plain_weights(logits: Tensor) -> Tensor:
    scores = logits.sigmoid()
    selected = (scores.detach() + _bias(logits.device)).topk(TOP_K, dim=-1).indices
    weights = scores.gather(1, selected)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return scores.scatter_add(1, selected, weights)


def _weights(logits: Tensor) -> Tensor:
    selected = select_experts(logits, _bias(logits.device), TOP_K)
    weights, scores = expert_weights(logits, selected)
    return scores.scatter_add(1, selected, weights)


@functools.cache
def _selected(tokens: int, device: torch.device) -> Tensor:
    """Different experts of each token, about evenly."""
    preference = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(0))
    return preference.topk(TOP_K).indices.to(device)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad[ctx.saved_tensors[1]], None, None


def _plain_rows(x: Tensor, weights: Tensor) -> Tensor:
    order = _selected(len(x), x.device).flatten().sort(stable=True).indices
    inverse = order.argsort()
    permuted: Tensor = _Permute.apply(x.repeat_interleave(TOP_K, dim=0), order, inverse)  # type: ignore[no-untyped-call]
    back: Tensor = _Permute.apply(permuted, inverse, order)  # type: ignore[no-untyped-call]
    return (weights[..., None] * back.unflatten(0, (-1, TOP_K))).sum(dim=1)


def _rows(x: Tensor, weights: Tensor) -> Tensor:
    places, offsets = sort_by_expert(_selected(len(x), x.device), EXPERTS)
    return combine_rows(dispatch_rows(x, places, offsets), weights, places, offsets)


def _inputs(function: str, tokens: int, columns: int, draw: Draw) -> dict[str, Tensor]:
    if function == "weights":
        # A step apart, so that every precision selects the same.
        ranks = draw(tokens, columns).argsort(dim=1).argsort(dim=1)
        return {"logits": ranks.to(torch.float32) * (6 / columns) - 3}
    _selected(tokens, draw(1).device)
    return {"x": draw(tokens, columns), "weights": draw(tokens, TOP_K, dtype=torch.float32)}


def case(function: str, dtype: str, tokens: int, columns: int) -> RowCase:
    """Weights ("weights") or rows there and back ("rows") of tokens x columns."""
    size = DTYPES[dtype].itemsize
    # Logits read and scores written; the other way both scores and their gradient are read.
    forward, backward = 2 * tokens * columns * size, 3 * tokens * columns * size
    if function == "rows":
        # A token read, its rows written and read, their sum in float32 written; and the other way,
        # with the rows read for the weights' gradient.
        forward = tokens * columns * ((1 + 2 * TOP_K) * size + 4)
        backward = tokens * columns * ((1 + 3 * TOP_K) * size + 4)
    return RowCase(
        function=function,
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=forward,
        backward_bytes=backward,
        make=functools.partial(_inputs, function, tokens, columns),
        formula=_plain_rows if function == "rows" else _plain_weights,
        ours=_rows if function == "rows" else _weights,
    )


class Routing(rows.RowBenchmark):
    """Selection and weights, and tokens' rows."""

    default_rows = (8192, 1024)
    default_columns = "384 logits; rows of 4096, on a CPU 2048"

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        super().add_options(add)
        add("--functions", nargs="+", choices=["weights", "rows"], default=["weights", "rows"], help="default: both")

    def cases(self, arguments: argparse.Namespace) -> Iterator[RowCase]:
        """Weights in float32, as routers have them; rows in every dtype."""
        widths = arguments.columns or [64 if arguments.quick else 4096 if arguments.device == "cuda" else 2048]
        if "weights" in arguments.functions and "float32" in arguments.dtypes:
            yield case("weights", "float32", arguments.rows, EXPERTS)
        if "rows" in arguments.functions:
            for dtype, columns in itertools.product(arguments.dtypes, widths):
                yield case("rows", dtype, arguments.rows, columns)


main = Routing("routing", __doc__).main

if __name__ == "__main__":
    sys.exit(main())
