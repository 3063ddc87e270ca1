"""Compile what benchmarks/gpu.sh launches, on a machine without a GPU, into a cache that travels.

    python -m benchmarks.precompile                  # some ten minutes of two cores, for an H100
    python -m benchmarks.precompile --parts attention --architecture 100
    python -m benchmarks.precompile --moved          # on the machine with the GPU; gpu.sh does it

Kernels are compiled by their own launches, on CPU tensors of the shapes that the tests and the
benchmarks have on a GPU. Triton takes a compiled kernel from its cache if source, constants, types,
divisibility of arguments, GPU and its own version are the same; what differs is compiled there.

The cache is build/triton_cache. It keeps the machine code alone, and Triton notes where that lies:
after a move the notes are written anew.
"""

import argparse
import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import cli
from benchmarks.lib.report import ROOT

MODULE = "benchmarks.precompile"
CACHE = ROOT / "build" / "triton_cache"
PROCESSORS = {90: 132, 100: 148}
"""Of an H100 and a B200: decoding cuts caches into parts for them."""

_CPU = torch.device("cpu")
Call = Callable[[], Any]


def _draw(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.zeros(shape, dtype=dtype or torch.bfloat16)  # memory that nobody touches costs nothing


def _differentiated(function: Callable[[Any], Tensor], inputs: dict[str, Tensor]) -> None:
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    out = function(leaves)
    torch.autograd.grad(out, list(leaves.values()), torch.zeros_like(out), allow_unused=True)


def _tests() -> Iterator[Call]:
    """The cases that tests and compute-sanitizer run, at the rows of both."""
    sys.path.append(str(ROOT / "tests"))
    cases = importlib.import_module("helpers.kernel_cases").CASES
    for make in cases.values():
        for rows in (150, 1024):
            yield make(_draw, "bf16", _CPU, rows)


def _attention() -> Iterator[Call]:
    from benchmarks.lib.shapes import LAYOUTS, attention_case
    from benchmarks.ops import attention

    for name in LAYOUTS:
        case = attention_case(name, "bf16", 4096, tokens=16384, head_divisor=1)
        for provider in ("triton", "triton_fast"):
            yield functools.partial(_differentiated, attention.ours(case, provider, _CPU), dict(case.make(_draw)))


def _rows() -> Iterator[Call]:
    """PolyNorm and the epilogue; kernels do not depend on the number of rows."""
    from benchmarks.ops import combine, poly_norm

    arguments = argparse.Namespace(device="cuda", quick=False, dtypes=["bf16"], rows=1024, columns=None)
    arguments.functions = ["poly_norm", "mul_poly_norm"]
    arguments.layouts, arguments.epilogues = list(combine.LAYOUTS), None
    for benchmark in (poly_norm.PolyNorm("poly_norm", ""), combine.Combine("combine", "")):
        for case in benchmark.cases(arguments):
            run = functools.partial(lambda case, t: case.ours(*t.values()), case)
            yield functools.partial(_differentiated, run, dict(case.make(_draw)))


def _decode() -> Iterator[Call]:
    from benchmarks.ops import decode

    for name in decode.DECODED:
        for batch, context in ((1, 32768), (8, 32768), (32, 8192), (128, 1024)):
            case = decode.decode_case(name, "bf16", batch, context)
            yield functools.partial(decode.ours(case, "triton", _CPU), case.make(_draw))


PARTS: dict[str, Callable[[], Iterator[Call]]] = {
    "tests": _tests,
    "attention": _attention,
    "rows": _rows,
    "decode": _decode,
}


def compile_parts(parts: list[str], architecture: int) -> Iterator[tuple[str, int, float]]:
    """Compile each part; its name, how many kernels it launched, and seconds."""
    from benchmarks.lib.compiling import compile_only
    from motif_kernels.impl.triton import decoding

    for family in ("poly_norm", "combine"):  # which CPU tensors else do not take to these kernels
        kernels = importlib.import_module(f"motif_kernels.impl.triton.{family}")
        operators: Any = importlib.import_module(f"motif_kernels.ops.{family}")
        operators.implementation = lambda family, device, kernels=kernels: kernels
    decoding._processors = lambda device: PROCESSORS[architecture]
    for part in parts:
        began = time.monotonic()
        with compile_only(architecture, gluon=architecture == 90, read=False) as found:
            for call in PARTS[part]():
                call()
        yield part, len(found), time.monotonic() - began


def settle(cache: Path) -> None:
    """Keep the machine code and what describes it, and note where they lie now."""
    for note in cache.glob("*/__grp__*.json"):
        kept = {}
        for file in note.parent.iterdir():
            if file == note:
                continue
            if file.suffix in (".json", ".cubin"):
                kept[file.name] = str(file)
            else:
                file.unlink()
        note.write_text(json.dumps({"child_paths": kept}))


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.bare_parser(MODULE, __doc__)
    add = parser.add_argument
    add("--cache", type=Path, default=CACHE, help="default: build/triton_cache")
    add("--architecture", type=int, choices=PROCESSORS, default=90, help="default: 90, an H100 or H200")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--moved", action="store_true", help="compile nothing; note where the cache lies now")
    options = parser.parse_args(argv)
    cache = options.cache.resolve()
    if not options.moved:
        # Whether kernels are interpreted is decided when triton is imported.
        os.environ |= {"TRITON_CACHE_DIR": str(cache), "TRITON_INTERPRET": "0"}
        for part, kernels, seconds in compile_parts(options.parts, options.architecture):
            print(f"{part}: {kernels} kernels for sm_{options.architecture}, {seconds:.0f} s", flush=True)
    settle(cache)
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    print(f"{cache}: {size / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
