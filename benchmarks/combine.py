"""The differential epilogue, signal minus lambda times noise and then sub-norm, gate or neither:
time and memory.

    python -m benchmarks.combine                         # on a CPU two to three minutes on two cores
    python -m benchmarks.combine --quick                 # a smoke test, with no meaning
    python -m benchmarks.combine --layouts gda --epilogues none sub-norm gate --columns 4096 8192

A row is a token: its length is the signal heads times their width. The layouts, at the size they
are named for:

    gda      GDA 4:1, 32 signal and 8 noise heads of 256, lambda one number, as Motif-2-12.7B has it (row 8,192)
    diff_v1  DIFF V1, 16 and 16 heads of 128, lambda one number (row 2,048)
    diff_v2  DIFF V2, 32 and 32 heads of 128, lambda for each token and head (row 4,096)

Other row lengths have other numbers of heads of the same width, in the same ratio: that is what a
wider model changes. By default each layout has its own epilogue (GDA and V1 the sub-norm, V2 none)
at its own size, on a GPU at every length from 2,048 to 32,768, and the other epilogues at its own
size (on a CPU for GDA alone).

Bytes: what each epilogue's mathematics must read and write, the noise heads once and never
repeated. Without sub-norm or gate the backward needs no signal. lambda for each token and head is
float32 and counted; a single lambda and the sub-norm's weight are not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from benchmarks import kernels
from benchmarks.kernels import DTYPES, Draw, Problem
from motif_kernels import diff_combine
from motifarch.errors import UserError

NORM_EPS = 1e-5
OUT_SCALE = 0.8


@dataclass(frozen=True)
class Layout:
    """How heads lie."""

    label: str
    ratio: int
    """Signal heads for each noise head."""
    head_width: int
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


def _difference(signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
    dtype = torch.promote_types(signal.dtype, torch.float32)
    noise = noise.to(dtype).repeat_interleave(signal.shape[-2] // noise.shape[-2], dim=-2)
    return signal.to(dtype) - (lam[..., None] if lam.ndim else lam) * noise


def plain_none(signal: Tensor, noise: Tensor, lam: Tensor) -> Tensor:
    """The difference as one writes it down: float32 (float64 for float64) and one rounding."""
    return _difference(signal, noise, lam).to(signal.dtype)


def plain_sub_norm(signal: Tensor, noise: Tensor, lam: Tensor, norm_weight: Tensor) -> Tensor:
    """With RMSNorm over each head."""
    a = _difference(signal, noise, lam)
    a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + NORM_EPS) * norm_weight
    return (a * OUT_SCALE).to(signal.dtype)


def plain_gate(signal: Tensor, noise: Tensor, lam: Tensor, gate: Tensor) -> Tensor:
    """With a sigmoid gate for each element."""
    a = _difference(signal, noise, lam)
    return (a * torch.sigmoid(gate.to(a.dtype))).to(signal.dtype)


def _ours_sub_norm(signal: Tensor, noise: Tensor, lam: Tensor, norm_weight: Tensor) -> Tensor:
    return diff_combine(signal, noise, lam, norm_weight=norm_weight, norm_eps=NORM_EPS, out_scale=OUT_SCALE)


def _ours_gate(signal: Tensor, noise: Tensor, lam: Tensor, gate: Tensor) -> Tensor:
    return diff_combine(signal, noise, lam, gate=gate)


CONTENDERS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "none": (plain_none, diff_combine),
    "sub-norm": (plain_sub_norm, _ours_sub_norm),
    "gate": (plain_gate, _ours_gate),
}


def _inputs(layout: Layout, epilogue: str, tokens: int, heads: int, draw: Draw) -> dict[str, Tensor]:
    width = layout.head_width
    inputs = {"signal": draw(tokens, heads, width), "noise": draw(tokens, heads // layout.ratio, width)}
    logits = draw(*((tokens, heads) if layout.per_token else ()), dtype=torch.float32)
    inputs["lambda"] = torch.sigmoid(logits)
    if epilogue == "sub-norm":
        inputs["norm_weight"] = 1 + 0.1 * draw(width, dtype=torch.float32)
    if epilogue == "gate":
        inputs["gate"] = draw(tokens, heads, width)
    return inputs


def problem(layout: Layout, epilogue: str, dtype: str, tokens: int, columns: int) -> Problem:
    """One epilogue on a layout with tokens of that length.

    Raises:
        UserError: the length is not that of a whole number of groups of heads.
    """
    group = layout.ratio * layout.head_width
    if columns % group:
        raise UserError(
            f"--columns {columns} is not a whole number of groups of {layout.label}'s heads; choose a multiple of "
            f"{group}, {layout.ratio} signal heads of {layout.head_width}"
        )
    heads = columns // layout.head_width
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
    formula, ours = CONTENDERS[epilogue]
    return Problem(
        function=f"{layout.label}, {'no epilogue' if epilogue == 'none' else epilogue}",
        dtype=dtype,
        rows=tokens,
        columns=columns,
        forward_bytes=forward,
        backward_bytes=backward,
        make=functools.partial(_inputs, layout, epilogue, tokens, heads),
        formula=formula,
        ours=ours,
    )


def problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """What the (resolved) command line asks for, an epilogue of a layout after the other.

    Raises:
        UserError: a row length that a layout cannot have.
    """
    cuda, quick = arguments.device == "cuda", arguments.quick
    tokens = arguments.rows or (4 if quick else 8192 if cuda else 1024)
    for name, epilogue, dtype in itertools.product(arguments.layouts, EPILOGUES, arguments.dtypes):
        layout = LAYOUTS[name]
        own = epilogue == layout.epilogue
        if epilogue not in (arguments.epilogues or (EPILOGUES if cuda or name == "gda" else (layout.epilogue,))):
            continue
        lengths = [2048, 4096, 8192, 16384, 32768] if cuda and own else [layout.columns]
        if quick:
            lengths = [layout.ratio * layout.head_width]
        for columns in arguments.columns or lengths:
            yield problem(layout, epilogue, dtype, tokens, columns)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = kernels.parser("combine", __doc__, rows="8192, on a CPU 1024", columns="see below")
    add, names = parser.add_argument, list(LAYOUTS)
    add("--layouts", nargs="+", choices=names, default=names, help="default: all")
    add("--epilogues", nargs="+", choices=EPILOGUES, help="of every layout; default: see below")
    arguments = parser.parse_args(argv)
    try:
        device = kernels.resolve(arguments)
        return kernels.run("combine", problems(arguments), arguments, device, Console())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
