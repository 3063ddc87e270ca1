"""The differential epilogue, signal minus lambda times noise, then sub-norm, gate or neither.

    python -m benchmarks.ops.combine             # on two CPU cores two to three minutes
    python -m benchmarks.ops.combine --layouts gda --epilogues none gate --columns 4096 8192

A row is a token: its length is the signal heads times their width. gda is Motif-2-12.7B's
(row 8,192), diff_v1 has a row of 2,048, diff_v2 one of 4,096 and lambda for each token and head.
Other lengths have other numbers of heads. By default each layout has its own epilogue at its own
size, on a GPU at 2,048 to 32,768, and the others at its own size (on a CPU for GDA alone). Bytes:
noise heads are read once; a single lambda and the sub-norm's weight are not counted.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import rows
from benchmarks.lib.bench import DTYPES
from benchmarks.lib.shapes import NORM_EPS, OUT_SCALE, Draw, RowCase
from motif_kernels import diff_combine, reference
from motifarch.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How heads lie."""

    label: str
    ratio: int
    """Signal heads for each noise head."""
    head_dim: int
    columns: int
    """Elements of a token's signal heads at the size that the layout is named for."""
    epilogue: str
    """Its own."""
    per_token: bool = False
    """lambda for each token and signal head; else one number."""


LAYOUTS = {
    "gda": Layout("GDA 4:1", 4, 256, 8192, "sub-norm"),
    "diff_v1": Layout("DIFF V1", 1, 128, 2048, "sub-norm"),
    "diff_v2": Layout("DIFF V2", 1, 128, 4096, "none", per_token=True),
}
EPILOGUES = ("none", "sub-norm", "gate")


def _plain(signal: Tensor, noise: Tensor, lam: Tensor, **epilogue: Any) -> Tensor:
    """The formula as one writes it down: float32 (float64 for float64) and one rounding."""
    return reference.diff_combine(signal, noise, lam, **epilogue).to(signal.dtype)


def _with(function: Callable[..., Tensor], epilogue: str) -> Callable[..., Tensor]:
    """A function of the inputs in order; the fourth is the sub-norm's weight or the gate."""
    if epilogue == "none":
        return function
    if epilogue == "gate":
        return lambda signal, noise, lam, gate: function(signal, noise, lam, gate=gate)
    fixed = {"norm_eps": NORM_EPS, "out_scale": OUT_SCALE}
    return lambda signal, noise, lam, norm_weight: function(signal, noise, lam, norm_weight=norm_weight, **fixed)


def _inputs(layout: Layout, epilogue: str, tokens: int, heads: int, draw: Draw) -> dict[str, Tensor]:
    width = layout.head_dim
    inputs = {"signal": draw(tokens, heads, width), "noise": draw(tokens, heads // layout.ratio, width)}
    logits = draw(*((tokens, heads) if layout.per_token else ()), dtype=torch.float32)
    inputs["lambda"] = torch.sigmoid(logits)
    if epilogue == "sub-norm":
        inputs["norm_weight"] = 1 + 0.1 * draw(width, dtype=torch.float32)
    if epilogue == "gate":
        inputs["gate"] = draw(tokens, heads, width)
    return inputs


def case(layout: Layout, epilogue: str, dtype: str, tokens: int, columns: int) -> RowCase:
    """One epilogue on a layout with tokens of that length.

    Raises:
        UserError: the length is not that of a whole number of groups of heads.
    """
    group = layout.ratio * layout.head_dim
    if columns % group:
        raise UserError(
            f"--columns {columns} is not a whole number of groups of {layout.label}'s heads; choose a multiple of "
            f"{group}, {layout.ratio} signal heads of {layout.head_dim}"
        )
    heads = columns // layout.head_dim
    signal = tokens * columns * DTYPES[dtype].itemsize
    noise = signal // layout.ratio
    lam = tokens * heads * torch.float32.itemsize if layout.per_token else 0
    # Read: signal, noise, lambda, gate. Written: the output.
    forward = 2 * signal + noise + lam + (signal if epilogue == "gate" else 0)
    # Read: the gradient, noise, lambda. Written: the gradients of signal, noise, lambda.
    backward = 2 * signal + 2 * noise + 2 * lam
    if epilogue != "none":
        backward += signal  # read
    if epilogue == "gate":
        backward += 2 * signal  # the gate and its gradient
    return RowCase(
        function=f"{layout.label}, {'no epilogue' if epilogue == 'none' else epilogue}",
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=forward,
        backward_bytes=backward,
        make=functools.partial(_inputs, layout, epilogue, tokens, heads),
        formula=_with(_plain, epilogue),
        ours=_with(diff_combine, epilogue),
    )


class Combine(rows.RowBenchmark):
    """The epilogues of every layout."""

    default_rows = (8192, 1024)
    default_columns = "see below"

    def add_options(self, add: Callable[..., Any]) -> None:
        """See :class:`KernelBenchmark`."""
        super().add_options(add)
        add("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="default: all")
        add("--epilogues", nargs="+", choices=EPILOGUES, help="of every layout; default: see below")

    def cases(self, arguments: argparse.Namespace) -> Iterator[RowCase]:
        """An epilogue of a layout after the other."""
        cuda, quick = arguments.device == "cuda", arguments.quick
        for name, epilogue, dtype in itertools.product(arguments.layouts, EPILOGUES, arguments.dtypes):
            layout = LAYOUTS[name]
            own = epilogue == layout.epilogue
            if epilogue not in (arguments.epilogues or (EPILOGUES if cuda or name == "gda" else (layout.epilogue,))):
                continue
            lengths = [2048, 4096, 8192, 16384, 32768] if cuda and own else [layout.columns]
            for columns in arguments.columns or ([layout.ratio * layout.head_dim] if quick else lengths):
                yield case(layout, epilogue, dtype, arguments.rows, columns)


main = Combine("combine", __doc__).main

if __name__ == "__main__":
    sys.exit(main())
