"""Predicted times of attention on an H100 beside four calls of FlashAttention-3. No GPU needed.

    python -m benchmarks.predicted                      # the layers that the project aims at
    python -m benchmarks.predicted --layers gda-128 --kernels triton --entry \\
        attention_forward=block_m:128,block_n:64,num_warps:8,num_stages:3

Each layer's forward and backward passes are compiled for sm_90 as they would be launched (--entry
replaces an entry of the launch tables, --kernels chooses between Gluon's and Triton's), their loops
are counted, and the static model of benchmarks.lib.predict says how long 2 sequences of 8,192
tokens take. Every figure is a prediction, good to 30%. Defects of inner loops
(benchmarks.lib.lints) stand beside each kernel. --figures adds PolyNorm, the epilogue, and what it
costs behind FlashAttention-4 on a B200.

Four calls are two of FlashAttention-3 for each map, of half of the values each, without what joins
them: by FlashAttention-3's published rates for dense attention, by the same model for windows.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.lib import calibration, cli, report
from benchmarks.lib.compiling import compile_only
from benchmarks.lib.predict import CONSTANTS, Compiled, Shape, attention_kernel, head_rows, layer, poly_norm, variant
from benchmarks.lib.sass import Loop
from motifarch.errors import UserError

MODULE = "benchmarks.predicted"


class Layer(NamedTuple):
    """What is predicted, and the ratio to four calls that the project aims at."""

    shape: Shape
    aim: float


LAYERS = {
    "diff-64": Layer(Shape(64, 128, 1, 16, 8192, 2), 1.4),
    "gda-64": Layer(Shape(64, 128, 4, 8, 8192, 2), 1.4),
    "gda-128": Layer(Shape(128, 256, 4, 8, 8192, 2), 1.0),
    "diff-64-window": Layer(Shape(64, 128, 1, 16, 8192, 2, window=512), 1.3),
    "gda-64-window": Layer(Shape(64, 128, 4, 8, 8192, 2, window=512), 1.3),
    "gda-128-window": Layer(Shape(128, 256, 4, 8, 8192, 2, window=512), 1.3),
}
# TFLOP/s, causal, 8K tokens: (forward, backward) by head_dim. Read off the charts of its paper,
# arXiv 2407.08608. meta-pytorch/tritonbench#1267 measured 685 and 539 at 128.
FLASH_3 = {64: (460, 430), 128: (660, 575)}
PEAK = 989e12  # FLOP/s of an H100 in 16 bits, by NVIDIA's data sheet


def compile_layer(shape: Shape, entries: Mapping[str, Mapping[str, int]], *, gluon: bool) -> list[dict[str, Any]]:
    """Both directions, compiled for sm_90."""
    from benchmarks.compiled import attention_call
    from motif_kernels import tuning

    window: dict[str, Any] = {} if shape.window is None else {"window_size": (shape.window - 1, 0)}
    options = window | {"group": shape.group, "epilogue": "norm"}
    with compile_only(90, gluon=gluon) as found, tuning.overriding(**entries):
        attention_call(torch.bfloat16, shape.head_dim, shape.v_head_dim, **options)
    return found


def flash_3(shape: Shape) -> tuple[float, float]:
    """Seconds of four calls, forward and backward."""
    d = shape.head_dim
    heads = shape.noise_heads * shape.maps * shape.v_head_dim // d
    if shape.window is None:
        flops, rates = 4 * d * heads * shape.pairs * shape.batch, FLASH_3[d]
        return flops / rates[0] * 1e-12, 2.5 * flops / rates[1] * 1e-12
    calls = Shape(d, d, 1, heads, shape.tokens, shape.batch, shape.window, noise=False)
    rows = json.loads(calibration.PATH.read_text(encoding="utf-8"))["rows"]
    kernels = {r["name"]: Compiled.of(r["kernel"]) for r in rows if "kernel" in r}  # others are layers
    names = (f"FA3 {direction}, {d}, causal" for direction in ("forward", "backward"))
    forward, backward = (attention_kernel(kernels[name], calls).seconds for name in names)
    return forward, backward


def roofline(shape: Shape) -> float:
    """Seconds of both directions at the tensor cores' peak, by the mathematics' operations."""
    d, dv, g = shape.head_dim, shape.v_head_dim, shape.group
    forward = 2 * (d + dv) * shape.maps
    backward = (6 * d + 4 * dv) * g + 6 * d * shape.noise
    return (forward + backward) * shape.pairs * shape.batch * shape.noise_heads / PEAK


def predict_layer(name: str, entries: Mapping[str, Mapping[str, int]], *, gluon: bool) -> dict[str, Any]:
    """A layer's kernels with their loops, and its times in milliseconds beside the others'."""
    shape, aim = LAYERS[name]
    found = compile_layer(shape, entries, gluon=gluon)
    parts = layer(found, shape)
    ours = [1e3 * sum(p.seconds for k, p in parts.items() if ("attention_backward" in k) is b) for b in (False, True)]
    theirs = [1e3 * seconds for seconds in flash_3(shape)]
    kernels = []
    for key, part in parts.items():
        usage = next(u for u in found if variant(u) == key)
        predicted = {"blocks": part.blocks, "clocks": part.main, "tflops": part.tflops, "ms": 1e3 * part.seconds}
        kernels.append({**usage, "predicted": predicted})
    return {
        "layer": name,
        "kernels": kernels,
        "on": "Gluon" if any(k["kernel"].startswith("gluon") for k in kernels) else "Triton",
        "ms": ours,
        "four_calls_ms": theirs,
        "ratios": [t / o for t, o in zip(theirs, ours, strict=True)] + [sum(theirs) / sum(ours)],
        "aim": aim,
        "roofline_ms": 1e3 * roofline(shape),
    }


def row_kernels() -> Iterator[dict[str, Any]]:
    """The predicted shares of copy bandwidth of PolyNorm and the epilogue, in 16 bits."""
    from motif_kernels.impl.triton import combine
    from motif_kernels.impl.triton import poly_norm as launch

    weight, bias = torch.ones(3), torch.ones(1)
    for columns in (8192, 16384):
        x = torch.empty(64, columns, dtype=torch.bfloat16)
        with compile_only(90) as found:
            launch.forward(
                x, x, weight, bias, inverse_rms=None, out_dtype=x.dtype, keep_inverse_rms=True, eps=1e-6,
                hidden_clamp=None,
            )  # fmt: skip
            moments = torch.empty(3, len(x))
            launch.backward(x, x, x, weight, bias, inverse_rms=moments, mean_products=None, hidden_clamp=None)
        for usage in found:
            kernel = Compiled.of(usage)
            share = poly_norm(kernel, columns).share(kernel)
            yield {"kernel": usage["kernel"], "of": f"{columns:,} columns, with up", "share": share, **_needs(kernel)}
    for group, width in ((1, 128), (4, 256)):
        signal, noise = (torch.empty(64, 2 * g, width, dtype=torch.bfloat16) for g in (group, 1))
        lam, norm = torch.ones(()), torch.ones(width)
        with compile_only(90) as found:
            combine.forward(signal, noise, lam, norm, None, out_dtype=signal.dtype, norm_eps=1e-5, out_scale=0.5)
            combine.backward(signal, signal, noise, lam, norm, None, norm_eps=1e-5, out_scale=0.5)
        for usage in found:
            kernel = Compiled.of(usage)
            share = head_rows(kernel, group, width).share(kernel)
            yield {"kernel": usage["kernel"], "of": f"{group}:1 heads of {width}", "share": share, **_needs(kernel)}


def _needs(kernel: Compiled) -> dict[str, int]:
    return {"registers": kernel.registers, "threads": kernel.threads, "blocks": kernel.blocks}


class Blackwell(NamedTuple):
    """FlashAttention-4 on a B200."""

    flops: float = 1.6e15
    """Its authors' figure, up to 1,613 TFLOP/s forward in bf16: arXiv's FlashAttention-4."""
    bytes_per_second: float = 7.2e12
    """Nine tenths of 8 TB/s."""
    rows: int = 256
    """Queries of a tile: each reads the keys and values that it sees."""


def combine_share(shape: Shape, gpu: Blackwell = Blackwell()) -> tuple[float, float]:  # noqa: B008 - constants
    """The epilogue's bytes over those of four calls, and its time over theirs, forward.

    Outputs in two pieces are read where they are.
    """
    d, g = shape.head_dim, shape.group
    pieces = shape.v_head_dim // d
    joined = (2 * g + 1) * shape.v_head_dim * 2 * shape.tokens
    seen = sum(x + y for x, y in shape.tiles(gpu.rows, 128)) * 128
    calls = shape.maps * pieces * 2 * d * 2 * (shape.tokens + seen)
    seconds = shape.maps * pieces * 4 * d * shape.pairs / gpu.flops
    return joined / calls, joined / gpu.bytes_per_second / seconds


# --- Tables ---------------------------------------------------------------------------------------

Cells = list[list[str]]


def layer_table(layers: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], Cells]:
    """Title, columns and cells."""
    columns = ["layer", "kernels", "forward ms", "backward ms", "FA3 x4 forward", "FA3 x4 backward", "forward",
               "backward", "both", "aim", "roofline ms"]  # fmt: skip
    cells = []
    for found in layers:
        numbers = [*found["ms"], *found["four_calls_ms"], *found["ratios"], found["aim"], found["roofline_ms"]]
        cells.append([found["layer"], found["on"], *(f"{x:.2f}" for x in numbers)])
    title = "Predicted, H100, 2 x 8,192 tokens, causal, bf16: time of four calls of FlashAttention-3 over ours"
    return title, columns, cells


def loop_table(layers: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], Cells]:
    """Title, columns and cells: the innermost loops with products of every kernel."""
    columns = ["layer, kernel", "tile, warps, stages", "registers, stack, KB, blocks", "slots", "products", "HMMA",
               "MUFU", "LDS words", "barriers", "LDL STL", "LDG cp.async TMA", "waits",
               "tensor + other + exposed = clocks", "TFLOP/s", "ms", "defects"]  # fmt: skip
    cells = []
    for found, kernel in ((f, k) for f in layers for k in f["kernels"]):
        loops = [loop for loop in map(Loop.parse, kernel["loops"]) if loop.mma or loop["hmma"]]
        constants, predicted = kernel["constants"], kernel["predicted"]
        tile = "x".join(str(constants[n]) for n in ("BLOCK_M", "BLOCK_N") if n in constants)
        needs = f"{kernel['registers']} {kernel['stack']} {kernel['shared'] // 1024} {predicted['blocks']}"
        tensor, other, exposed, total = predicted["clocks"]
        shape = f"{tile} {kernel['warps']}x{kernel['streams']} {kernel['stages']}"
        name = f"{found['layer']}, {kernel['kernel'].replace('attention_', '')}"
        last = [f"{tensor:.0f} + {other:.0f} + {exposed:.0f} = {total:.0f}", f"{predicted['tflops']:.0f}"]
        last += [f"{predicted['ms']:.2f}", ", ".join(kernel["lints"])]
        for loop in loops:
            products = " ".join(f"{n}*{shape}" for shape, n in loop.mma.items())
            counts = [loop["hmma"], loop["mufu"], loop.shared_words, loop["barriers"] + loop["mbarrier"]]
            moved = f"{loop['ldg']} {loop['cp_async']} {loop['tma_load']}"
            row = [str(loop.instructions), products, *map(str, counts), f"{loop['ldl']} {loop['stl']}", moved]
            waits = f"{loop['async_waits']} + {loop['mma_waits']}"
            cells.append([name, shape, needs, *row, waits, *(last if loop is loops[0] else [""] * 4)])
        if not loops:
            cells.append([name, shape, needs, *[""] * 9, "", "", last[2], last[3]])
    return "Innermost loops with products, an iteration of a warp; predicted clocks of a multiprocessor", columns, cells


def row_table(rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[str], Cells]:
    """Title, columns and cells."""
    columns = ["kernel", "of", "registers", "threads", "blocks", "share of a copy"]
    numbers = ("registers", "threads", "blocks")
    cells = [[r["kernel"], r["of"], *(str(r[n]) for n in numbers), f"{100 * r['share']:.0f}%"] for r in rows]
    return "Predicted, H100, bf16: kernels of rows", columns, cells


def combine_table() -> tuple[str, list[str], Cells]:
    """Title, columns and cells."""
    cells = []
    for name, (shape, _) in LAYERS.items():
        moved, seconds = combine_share(shape)
        cells.append([name, f"{100 * moved:.0f}%", f"{100 * seconds:.0f}%"])
    return (
        "Predicted, B200, forward: what joins four calls of FlashAttention-4, over the calls themselves",
        ["layer", "bytes", "time"],
        cells,
    )


def markdown(found: Mapping[str, Any]) -> str:
    """Every table of what :func:`collect` gave, as Markdown."""
    tables = [layer_table(found["layers"])]
    if found["rows"]:
        tables += [row_table(found["rows"]), combine_table()]
    parts = []
    for title, columns, cells in (*tables, loop_table(found["layers"])):
        lines = [columns, ["---"] * len(columns), *cells]
        parts.append(f"## {title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines))
    title = "# Predicted by a static model of compiled kernels: nothing here was measured"
    return "\n\n".join([title, *parts, f"At {CONSTANTS.clock / 1e9:.2f} GHz {calibration.summary()}."])


# --- The command ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = cli.bare_parser(MODULE, __doc__)
    add = made.add_argument
    add("--layers", nargs="+", choices=LAYERS, default=list(LAYERS), help="default: all")
    add("--kernels", nargs="+", choices=("gluon", "triton"), default=["gluon", "triton"], help="default: both")
    add("--entry", nargs="+", default=[], metavar="KERNEL=FIELD:VALUE,...", help="entries of the launch tables")
    add("--figures", action="store_true", help="PolyNorm, the epilogue and its share on a B200 too")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    return made


def collect(arguments: Sequence[str]) -> dict[str, Any]:
    """What the command with these arguments predicts: "layers" and "rows".

    Raises:
        RuntimeError: something does not compile.
    """
    # A process of its own: whether kernels are interpreted is decided when triton is imported.
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(report.ROOT), *sys.path])}
    command = [sys.executable, "-m", MODULE, "--worker", *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _entries(texts: Sequence[str]) -> dict[str, dict[str, int]]:
    try:
        pairs = (text.split("=") for text in texts)
        return {k: {n: int(v) for n, v in (f.split(":") for f in fields.split(","))} for k, fields in pairs}
    except ValueError as error:
        given = " ".join(texts)
        raise UserError(f"--entry {given}: use attention_forward=block_m:128,block_n:64,num_warps:8") from error


def _worker(options: argparse.Namespace) -> dict[str, Any]:
    entries = _entries(options.entry)
    layers = []
    for name in options.layers:
        for kernels in options.kernels:
            found = predict_layer(name, entries, gluon=kernels == "gluon")
            if found["on"].lower() == kernels or len(options.kernels) == 1:
                layers.append(found)
    return {"layers": layers, "rows": list(row_kernels()) if options.figures else []}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(argv)
    if options.worker:
        print(json.dumps(_worker(options)))
        return 0
    _entries(options.entry)
    found = collect(sys.argv[1:] if argv is None else argv)
    print(markdown(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
