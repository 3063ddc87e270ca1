"""Predicted times of attention on an H100 beside four calls of FlashAttention-3. No GPU needed.

    python -m benchmarks.predicted                     # the layers that the project aims at
    python -m benchmarks.predicted --layers gda-128 --entry \\
        attention_forward=block_m:128,block_n:64,num_warps:8,num_stages:3

Each layer's forward and backward passes are compiled for sm_90 as they would be launched (--entry
replaces an entry of the launch tables), their loops are counted, and the static model of
benchmarks.lib.predict says how long 2 sequences of 8,192 tokens take. Every figure is a prediction,
good to 30%. Defects of inner loops (benchmarks.lib.lints) stand beside each kernel.

Four calls are two of FlashAttention-3 for each map, of half of the values each, without what joins
them: by FlashAttention-3's published rates for dense attention, by the same model for windows.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import calibration, cli, report
from benchmarks.lib.compiling import compile_only
from benchmarks.lib.predict import Compiled, Part, Shape, attention_kernel, layer

MODULE = "benchmarks.predicted"
LAYERS = {
    "diff-64": Shape(64, 128, 1, 16, 8192, 2),
    "gda-64": Shape(64, 128, 4, 8, 8192, 2),
    "gda-128": Shape(128, 256, 4, 8, 8192, 2),
    "diff-64-window": Shape(64, 128, 1, 16, 8192, 2, window=512),
    "gda-64-window": Shape(64, 128, 4, 8, 8192, 2, window=512),
    "gda-128-window": Shape(128, 256, 4, 8, 8192, 2, window=512),
}
AIMS = {
    "diff-64": 1.4,
    "gda-64": 1.4,
    "gda-128": 1.0,
    "diff-64-window": 1.3,
    "gda-64-window": 1.3,
    "gda-128-window": 1.3,
}
# TFLOP/s, causal, 8K tokens: (forward, backward) by head_dim. Read off the charts of its paper,
# arXiv 2407.08608. meta-pytorch/tritonbench#1267 measured 685 and 539 at 128.
FLASH_3 = {64: (460, 430), 128: (660, 575)}
BACKWARD = ("backward", "prepare", "keys", "queries")


def compile_layer(shape: Shape, entries: dict[str, dict[str, int]], backend: str) -> list[dict[str, Any]]:
    """Both directions, compiled for sm_90."""
    from benchmarks.compiled import attention_call
    from motif_kernels import tuning

    window: dict[str, Any] = {} if shape.window is None else {"window_size": (shape.window - 1, 0)}
    with compile_only(90) as found, tuning.overriding(**entries):
        attention_call(
            torch.bfloat16, shape.head_dim, shape.v_head_dim, group=shape.group, epilogue="norm", backend=backend,
            **window,
        )  # fmt: skip
    return found


def flash_3(shape: Shape) -> tuple[float, float]:
    """Seconds of four calls, forward and backward."""
    d = shape.head_dim
    pieces = shape.v_head_dim // d
    heads = shape.noise_heads * shape.maps * pieces
    if shape.window is None:
        flops = 4 * d * heads * shape.pairs * shape.batch
        rates = FLASH_3[d]
        return flops / rates[0] * 1e-12, 2.5 * flops / rates[1] * 1e-12
    calls = Shape(d, d, 1, heads, shape.tokens, shape.batch, shape.window, noise=False)
    rows = json.loads(calibration.PATH.read_text(encoding="utf-8"))["rows"]
    kernels = {r["name"]: Compiled.of(r["kernel"]) for r in rows}
    forward, backward = (
        attention_kernel(kernels[f"FA3 {direction}, {d}, causal"], calls).seconds
        for direction in ("forward", "backward")
    )
    return forward, backward


def is_backward(kernel: str) -> bool:
    """Whether a kernel belongs to the backward pass."""
    return "attention_backward" in kernel


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    add = made.add_argument
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    add("--backend", default="triton", help="of motif_kernels; default %(default)s")
    add("--entry", nargs="+", default=[], metavar="KERNEL=FIELD:VALUE,...", help="entries of the launch tables")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(argv)
    if not options.worker:  # a process of its own: whether kernels are interpreted is decided on import
        env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(report.ROOT), *sys.path])}
        command = [sys.executable, "-m", MODULE, "--worker", *(sys.argv[1:] if argv is None else argv)]
        return subprocess.run(command, env=env, check=False).returncode
    entries = {}
    for text in options.entry:
        kernel, _, fields = text.partition("=")
        entries[kernel] = {name: int(value) for name, _, value in (f.partition(":") for f in fields.split(","))}
    console = Console(width=200)
    summary = report.table(
        "Predicted, H100, 2 x 8,192 tokens, causal: four calls of FlashAttention-3 / ours",
        ("layer", "forward\nms", "backward\nms", "FA3 x 4\nforward", "FA3 x 4\nbackward", "forward\nratio",
         "backward\nratio", "both\nratio", "aim"),
        [],
    )  # fmt: skip
    for name in options.layers:
        shape = LAYERS[name]
        found = compile_layer(shape, entries, options.backend)
        parts = layer(found, shape)
        for usage in found:
            if part := parts.get(usage["kernel"]):
                console.print(f"{name}: {describe(usage, part)}", soft_wrap=True)
        ours = [1e3 * sum(p.seconds for k, p in parts.items() if is_backward(k) is way) for way in (False, True)]
        theirs = [1e3 * seconds for seconds in flash_3(shape)]
        cells = [
            *ours,
            *theirs,
            *(t / o for t, o in zip(theirs, ours, strict=True)),
            sum(theirs) / sum(ours),
            AIMS[name],
        ]
        summary.add_row(name, *(f"{c:.2f}" for c in cells))
    console.print(summary)
    return 0


def describe(usage: dict[str, Any], part: Part) -> str:
    """A kernel in one line."""
    constants = usage["constants"]
    tile = "x".join(str(constants[n]) for n in ("BLOCK_M", "BLOCK_N") if n in constants)
    main = part.main
    clocks = "tensor {:.0f}, other {:.0f}, exposed {:.0f}, in all {:.0f}".format(*main)
    needs = f"{usage['registers']} registers, {usage['stack']} B stack, {usage['shared'] // 1024} KB"
    defects = f"; DEFECTS: {', '.join(usage['lints'])}" if usage["lints"] else ""
    return (
        f"{usage['kernel']} {tile} {usage['warps']} warps x {usage['streams']}, {usage['stages']} stages: {needs}, "
        f"{part.blocks} a SM; clocks: {clocks}; {part.tflops:.0f} TFLOP/s, {1e3 * part.seconds:.2f} ms{defects}"
    )


if __name__ == "__main__":
    sys.exit(main())
